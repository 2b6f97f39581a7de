"""The loss terms of a micro-batch, the same for every schedule."""

from functools import cached_property

import torch
from torch import Tensor

from mtp_lightning.losses import reference
from mtp_lightning.losses.chunked import Term
from mtp_lightning.losses.distillation import Distillation, teacher_positions
from mtp_lightning.losses.scores import CrossEntropy, TokenOrder
from mtp_lightning.losses.targets import IGNORE
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.training.step.objective import MicroBatch, Objective, OffsetLosses


class Terms:
    """Loss terms of a micro-batch, made offset by offset and read out at the end."""

    def __init__(self, model: MtpModel, batch: MicroBatch, objective: Objective) -> None:
        self.model, self.batch, self.objective = model, batch, objective
        self.scores: dict[int, CrossEntropy] = {}
        self.distillations: dict[int, Distillation] = {}

    def of(self, offset: int) -> list[Term]:
        """Cross-entropy of an offset, with its distillation, and token order at the main head."""
        section, targets = self.objective.section, self.batch.targets[offset - 1].flatten()
        score = CrossEntropy(
            targets,
            smoothing=section.label_smoothing,
            z_loss=section.z_loss,
            predicts=self.objective.predicts,
        )
        self.scores[offset] = score
        count = (targets != IGNORE).sum() if self.objective.is_balanced else None
        coefficient = self.objective.coefficients[offset - 1]
        term = Term(self.model.unembedding.matrix_index(offset), score, coefficient, count)
        terms = [term]
        if offset > 1 and section.distill is not None:
            term.share, term.distillation = section.distill.alpha_of(offset), self.distillation(offset)
        if offset == 1 and section.token_order is not None:
            terms.append(self._token_order(section.token_order.window_tokens))
        return terms

    def wants(self, offset: int, hidden: Tensor) -> bool:
        """Tell whether an offset's loss is computed; where all is frozen it teaches nothing, and is only measured."""
        own = self.model.unembedding.parameters_of(offset)
        return self.objective.predicts or hidden.requires_grad or any(parameter.requires_grad for parameter in own)

    @property
    def teacher_learns(self) -> bool:
        """Whether the main head learns from being compared with, too."""
        distill = self.objective.section.distill
        return distill is not None and not distill.detach_teacher

    def teacher_of(self, main: Tensor) -> Tensor:
        """States or logits of the main head as a teacher: without a gradient path, unless it learns."""
        return main if self.teacher_learns else main.detach()

    @cached_property
    def has_teacher(self) -> Tensor:
        """Where each offset has a teacher, (N, B, T)."""
        return teacher_positions(self.batch.targets)

    def distillation(self, offset: int) -> Distillation | None:
        """What an offset learns from the main head; None where its weight is 0."""
        section = self.objective.section.distill
        assert section is not None
        if not section.beta_of(offset):
            return None
        self.distillations[offset] = Distillation(
            section,
            shift=offset - 1,
            has_teacher=self.has_teacher[offset - 1].flatten(),
            weight=self.objective.distill_weights[offset - 1],
            matrix=self.model.unembedding.matrix_index(1),
        )
        return self.distillations[offset]

    def _token_order(self, window: int) -> Term:
        score = TokenOrder(self.batch.tokens, self.batch.documents, self.model.num_offsets, window)
        coefficient = self.objective.token_order_coefficient
        return Term(len(self.model.unembedding.matrices) - 1, score, coefficient)

    def record(self, offset: int, logits: Tensor) -> None:
        """Note an offset's plain loss and predictions from its full logits, (P, V)."""
        score = CrossEntropy(
            self.batch.targets[offset - 1].flatten(), smoothing=0.0, z_loss=0.0, predicts=self.objective.predicts
        )
        score.nll_sum = reference.cross_entropy(logits, score.targets, 0.0, 0.0).sum()
        score.predictions = logits.argmax(-1) if self.objective.predicts else None
        self.scores[offset] = score

    def losses(self) -> OffsetLosses:
        """Collect what the terms have seen."""
        shape = self.batch.targets.shape[1:]
        like = self.objective.coefficients
        sums = torch.full_like(like, torch.nan)
        predictions = torch.full_like(self.batch.targets, IGNORE) if self.objective.predicts else None
        for offset, score in self.scores.items():
            sums[offset - 1] = score.nll_sum
            if predictions is not None and score.predictions is not None:
                predictions[offset - 1] = score.predictions.view(shape)
        divergences = None if self.objective.section.distill is None else torch.full_like(like, torch.nan)
        for offset, distillation in self.distillations.items():
            assert divergences is not None
            divergences[offset - 1] = distillation.loss_sum
        return OffsetLosses(sums, predictions, divergences)
