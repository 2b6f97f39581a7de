"""The loss of a step: its weights and counts (`Objective`), and its terms in one micro-batch (`LossTerms`).

    loss = sum over offsets k of  weight_k x ranks / targets_k  x  sum over positions of  cross_entropy
                                                                   (+ beta_k x targets_k / teachers_k x divergence)

`targets_k` counts the valid targets of the whole global batch, so that neither micro-batches nor ranks nor padding
change the gradient. With a draft vocabulary offsets beyond the first score V' entries: targets that are not among them
are not counted, and a teacher's distribution is renormalised over them; where its own choice is not among them its
divergence is 0, though the position counts in `teachers_k` [EAGLE-3].
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mtp_lightning.losses import reference
from mtp_lightning.losses.chunked import Term
from mtp_lightning.losses.distillation import Distillation, Drafted, teacher_positions
from mtp_lightning.losses.row_losses import CrossEntropy, TokenOrder
from mtp_lightning.losses.targets import IGNORE
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.recipe.schema.objective import ObjectiveSection
from mtp_lightning.training.step.batch import MicroBatch, filled
from mtp_lightning.training.step.rollout import Rollout, RolloutDraw


@dataclass(frozen=True)
class Objective:
    """The loss of every micro-batch of a step: section of the recipe, weights, counts of the global batch."""

    section: ObjectiveSection
    weights: list[float]  # one per offset, on the host: an offset of weight 0 is not computed
    counts: Tensor  # (N,) valid targets of the whole global batch that the offset scores
    num_ordered: Tensor | None = None  # positions of the global batch that have a token-order target
    predicts: bool = False  # also take the argmax of every offset
    num_ranks: int = 1  # that the strategy averages gradients over, where the loss is a sum over all of them
    teacher_counts: Tensor | None = None  # (N,) positions of the whole global batch that have a teacher
    loss_scale: float = 1.0  # that each backward pass multiplies gradients by (fp16)
    weights_with_targets: list[float] | None = None  # the weights, 0 where this global batch has no target
    rollout: RolloutDraw | None = None  # where far offsets read drafts

    @cached_property
    def coefficients(self) -> Tensor:
        """Factor of each offset's loss sum: weight x ranks / count, (N,)."""
        exact = torch.float64 if self.counts.dtype == torch.float64 else torch.float32
        weights = filled(self.weights, self.counts.new_empty((), dtype=exact))
        return self.num_ranks * weights / self.counts.clamp(min=1)

    @cached_property
    def distill_weights(self) -> Tensor:
        """Factor of divergences beside the cross-entropy, (N,): beta x its count / count of teachers."""
        distill, teacher_counts = self.section.distill, self.teacher_counts
        assert distill is not None
        assert teacher_counts is not None
        betas = [0.0, *(distill.beta_of(offset) for offset in range(2, len(self.counts) + 1))]
        return filled(betas, self.coefficients) * self.counts.clamp(min=1) / teacher_counts.clamp(min=1)

    @cached_property
    def token_order_coefficient(self) -> Tensor:
        """Factor of the token-order loss sum, 0-dimensional."""
        section, num_ordered = self.section.token_order, self.num_ordered
        assert section is not None
        assert num_ordered is not None
        return self.num_ranks * section.weight / num_ordered.to(self.coefficients.dtype).clamp(min=1)

    def share_of(self, batch: MicroBatch) -> Tensor:
        """Share of a micro-batch in the targets of the whole global batch, times ranks and loss scale, 0-dimensional.

        It weighs what is a mean over the micro-batch (the loss of routers), whose gradients backward passes add up.
        """
        targets = (batch.targets[0] != IGNORE).sum().to(self.coefficients.dtype)
        return targets / self.counts[0].clamp(min=1) * (self.num_ranks * self.loss_scale)

    @property
    def has_targets(self) -> bool:
        """Whether this global batch has a gradient at all: any target of an offset with a weight, or of token order."""
        has_order = self.section.token_order is not None and bool(self.num_ordered)
        return self.weights_with_targets is None or any(self.weights_with_targets) or has_order

    @property
    def is_balanced(self) -> bool:
        """Whether extra losses are scaled to the main head's RMS."""
        return self.section.balance == "rms"


class OffsetLosses(NamedTuple):
    """Unweighted results of a micro-batch; NaN where an offset was not computed."""

    nll_sums: Tensor  # (N,) sum of -log p(target)
    predictions: Tensor | None  # (N, B, T) argmax of every offset
    divergence_sums: Tensor | None = None  # (N,) sum of divergences from the teacher
    overlaps: Tensor | None = None  # (N, B, T) sum of min(p, q) with the main head for the same token
    computed: tuple[int, ...] = ()  # offsets that were computed
    off_text: Tensor | None = None  # (N,) targets whose position is drawn and has a draft before that is not the token
    is_outside: Tensor | None = None  # (N, B, T) targets outside the draft vocabulary; None without one
    router_loss: Tensor | None = None  # 0-dimensional, of a trunk with experts

    def of_rows(self, chosen: Tensor) -> "OffsetLosses":
        """Keep the results per position of some rows, chosen by a (B,) mask; sums of losses become zero."""
        predictions, overlaps, is_outside = (
            None if kept is None else kept[:, chosen] for kept in (self.predictions, self.overlaps, self.is_outside)
        )
        no_sums = torch.zeros_like(self.nll_sums).where(~self.nll_sums.isnan(), torch.nan)
        return OffsetLosses(no_sums, predictions, None, overlaps, is_outside=is_outside)


class LossTerms:
    """Loss terms of a micro-batch, made offset by offset and read out at the end; the same for every backward order."""

    def __init__(self, model: MtpModel, batch: MicroBatch, objective: Objective) -> None:
        self.model, self.batch, self.objective = model, batch, objective
        self.cross_entropies: dict[int, CrossEntropy] = {}
        self.distillations: dict[int, Distillation] = {}
        self.rollout = None if objective.rollout is None else Rollout(model, batch, objective.rollout)
        self.drafted = Drafted()

    def for_offset(self, offset: int) -> list[Term]:
        """Return the cross-entropy of an offset, with its distillation, and at the main head token order."""
        section, targets = self.objective.section, self.targets(offset)
        learns = self.learns_at(offset)
        cross_entropy = CrossEntropy(
            targets,
            smoothing=section.label_smoothing,
            z_loss=section.z_loss,
            predicts=self.objective.predicts or self.wants_draft(offset),
            learns=learns,
            compiles=self.model.is_compiled,
            kernel=self.model.loss_kernel,
        )
        self.cross_entropies[offset] = cross_entropy
        count = None
        if self.objective.is_balanced:
            count = ((targets != IGNORE) & (True if learns is None else learns)).sum()
        coefficient = self.objective.coefficients[offset - 1]
        term = Term(self.model.unembedding.term_matrix(offset), cross_entropy, coefficient, count)
        terms = [term]
        if offset > 1 and section.distill is not None:
            term.share, term.distillation = section.distill.alpha_of(offset), self.distillation(offset)
        if offset == 1 and section.token_order is not None:
            terms.append(self._token_order(section.token_order.window_size))
        return terms

    def targets(self, offset: int) -> Tensor:
        """Targets as the offset's scores are numbered, (P,)."""
        return self.model.unembedding.scored_targets(offset, self.batch.targets[offset - 1]).flatten()

    def needs_loss(self, offset: int, hidden: Tensor) -> bool:
        """Return whether this offset's loss has a gradient or is logged; else it need not be computed."""
        own = self.model.unembedding.parameters_of(offset)
        return self.objective.predicts or hidden.requires_grad or any(parameter.requires_grad for parameter in own)

    def wants_draft(self, offset: int) -> bool:
        """Return whether a later offset may read what this one drafts."""
        return self.rollout is not None and self.rollout.wants_draft(offset)

    def learns_at(self, offset: int) -> Tensor | None:
        """Return which rows of an offset have a loss, (P,); None for all that have a target."""
        return None if self.rollout is None else self.rollout.learns_at(offset)

    def scored(self, offset: int, hidden: Tensor) -> Tensor:
        """Return what is scored of an offset's state: (B, T, D), or two streams of it, -> (B, T, D).

        Where windows are cut over ranks, positions of the next slice follow, for which the main head alone has a state.
        """
        if self.rollout is not None:
            return self.rollout.scored(hidden)
        sequence, num_offsets = self.batch.sequence, len(self.batch.targets)
        if sequence is None:
            return hidden
        if offset > 1:
            return pad(hidden, (0, 0, 0, sequence.num_ahead(num_offsets)))
        with torch.set_grad_enabled(self.teacher_learns and torch.is_grad_enabled()):
            ahead = sequence.ahead(hidden, num_offsets)
        return torch.cat((hidden, ahead), 1)

    @property
    def teacher_learns(self) -> bool:
        """Whether the distillation loss has a gradient for the main head, too (`detach_teacher: false`)."""
        distill = self.objective.section.distill
        return distill is not None and not distill.detach_teacher

    def teacher_of(self, main: Tensor) -> Tensor:
        """Return states or logits of the main head as a teacher: detached, unless it learns."""
        return main if self.teacher_learns else main.detach()

    @cached_property
    def has_teacher(self) -> Tensor:
        """Where each offset has a teacher, (N, B, T)."""
        return teacher_positions(self.batch.targets)

    def distillation(self, offset: int) -> Distillation | None:
        """Return the distillation of the main head into an offset; None where its weight is 0."""
        section = self.objective.section.distill
        assert section is not None
        if not section.beta_of(offset):
            return None
        self.distillations[offset] = Distillation(
            section,
            shift=offset - 1,
            has_teacher=self.has_teacher[offset - 1].flatten(),
            weight=self.objective.distill_weights[offset - 1],
            matrix=self.model.unembedding.teacher_matrix,
            learns=self.learns_at(offset),
            drafted=self.drafted,
        )
        return self.distillations[offset]

    def _token_order(self, window: int) -> Term:
        row_loss = TokenOrder(self.batch.tokens, self.batch.documents, self.model.num_offsets, window)
        coefficient = self.objective.token_order_coefficient
        return Term(len(self.model.unembedding.matrices) - 1, row_loss, coefficient)

    def record(self, offset: int, logits: Tensor) -> None:
        """Take an offset's plain loss and predictions from all that it scores, (P, V or V')."""
        cross_entropy = CrossEntropy(self.targets(offset), smoothing=0.0, z_loss=0.0, predicts=self.objective.predicts)
        cross_entropy.nll_sum = reference.cross_entropy(logits, cross_entropy.targets, 0.0, 0.0).sum()
        cross_entropy.predictions = logits.argmax(-1) if self.objective.predicts else None
        self.cross_entropies[offset] = cross_entropy

    def losses(self) -> OffsetLosses:
        """Collect the results of all terms."""
        shape = self.batch.targets.shape[1:]
        like = self.objective.coefficients
        sums = torch.full_like(like, torch.nan)
        predictions = torch.full_like(self.batch.targets, IGNORE) if self.objective.predicts else None
        for offset, cross_entropy in self.cross_entropies.items():
            sums[offset - 1] = cross_entropy.nll_sum
            if predictions is not None and cross_entropy.predictions is not None:
                vocabulary = self.model.unembedding.vocabulary(offset)
                found = cross_entropy.predictions.view(shape)
                predictions[offset - 1] = found if vocabulary is None else vocabulary.spoken(found)
        divergences = None if self.objective.section.distill is None else torch.full_like(like, torch.nan)
        for offset, distillation in self.distillations.items():
            assert divergences is not None
            divergences[offset - 1] = distillation.measured_sum
        off_text = None
        if self.rollout is not None:
            off_text = torch.full_like(like, torch.nan)
            for offset, number in self.rollout.num_off_text.items():
                off_text[offset - 1] = number
        return OffsetLosses(
            sums,
            predictions,
            divergences,
            computed=tuple(sorted(self.cross_entropies)),
            off_text=off_text,
            is_outside=self._outside(),
            router_loss=None if self.model.router_loss is None else self.model.router_loss.value,
        )

    def _outside(self) -> Tensor | None:
        drafts, targets = self.model.unembedding.drafts, self.batch.targets
        if drafts is None:
            return None
        return torch.cat((torch.zeros_like(targets[:1], dtype=torch.bool), drafts.lacks(targets[1:])))
