"""Three orders of head forward and backward that give the same gradients.

joint       every head's full logits in one graph, one backward; slow and hungry, the oracle
sequential  one head at a time: forward, chunked loss, backward, freed; the trunk last [Gloeckle 2024, section 2.2]
bridged     ordinary graph up to the hidden states, one node for all chunked losses, one backward
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_lightning.losses import reference
from mtp_lightning.losses.chunked import Term
from mtp_lightning.losses.scores import CrossEntropy, TokenOrder
from mtp_lightning.losses.targets import IGNORE
from mtp_lightning.model.heads import TRUNK, HeadContext
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.recipe.sections import ObjectiveSection

Backward = Callable[[Tensor], None]


class MicroBatch(NamedTuple):
    """Rows that go through the model together."""

    tokens: Tensor  # (B, T+n)
    documents: Tensor  # (B, T+n)
    targets: Tensor  # (N, B, T)


@dataclass(frozen=True)
class Objective:
    """What a micro-batch's loss is made of: recipe, weights of this step, counts of this global batch."""

    section: ObjectiveSection
    weights: list[float]  # one per offset, on the host: an offset of weight 0 is not computed
    counts: Tensor  # (N,) valid targets of the whole global batch
    num_ordered: Tensor | None = None  # positions of the global batch that have a token-order target
    predicts: bool = False  # also take the argmax of every offset
    num_ranks: int = 1  # that the strategy averages gradients over, where the loss is a sum over all of them
    loss_scale: float = 1.0  # that each backward pass multiplies gradients by (fp16)

    @cached_property
    def coefficients(self) -> Tensor:
        """Factor of each offset's loss sum: weight x ranks / count, (N,)."""
        exact = torch.float64 if self.counts.dtype == torch.float64 else torch.float32
        weights = torch.tensor(self.weights, dtype=exact, device=self.counts.device)
        return self.num_ranks * weights / self.counts.clamp(min=1)

    @cached_property
    def token_order_coefficient(self) -> Tensor:
        """Factor of the token-order loss sum, 0-dimensional."""
        section, num_ordered = self.section.token_order, self.num_ordered
        assert section is not None
        assert num_ordered is not None
        return self.num_ranks * section.weight / num_ordered.to(self.coefficients.dtype).clamp(min=1)

    @property
    def is_balanced(self) -> bool:
        """Tell whether extra losses are scaled to the main head's RMS."""
        return self.section.balance == "rms"


class OffsetLosses(NamedTuple):
    """Unweighted results of a micro-batch; NaN where an offset was not computed."""

    nll_sums: Tensor  # (N,) sum of -log p(target)
    predictions: Tensor | None  # (N, B, T) argmax of every offset


def run_schedule(model: MtpModel, batch: MicroBatch, objective: Objective, backward: Backward) -> OffsetLosses:
    """Add the gradients of one micro-batch to the parameters, in the order that the recipe names."""
    return SCHEDULES[objective.section.schedule](model, batch, objective, backward)


def needed_offsets(model: MtpModel, objective: Objective) -> list[int]:
    """Offsets that have a weight, or that one with a weight depends on."""
    active = {offset for offset, weight in enumerate(objective.weights, start=1) if weight > 0}
    return [offset for offset in model.heads.offsets if model.heads.subtree(offset) & active]


class _Terms:
    """Loss terms of a micro-batch, made offset by offset and read out at the end."""

    def __init__(self, model: MtpModel, batch: MicroBatch, objective: Objective) -> None:
        self.model, self.batch, self.objective = model, batch, objective
        self.scores: dict[int, CrossEntropy] = {}

    def of(self, offset: int) -> list[Term]:
        """Cross-entropy of an offset, and token order at the main head."""
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
        terms = [Term(self.model.unembedding.matrix_index(offset), score, coefficient, count)]
        if offset == 1 and section.token_order is not None:
            terms.append(self._token_order(section.token_order.window_tokens))
        return terms

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
        return OffsetLosses(sums, predictions)


def sequential(model: MtpModel, batch: MicroBatch, objective: Objective, backward: Backward) -> OffsetLosses:
    """Walk the tree of heads from the far end; no two heads' logits ever exist together."""
    embedded = model.embed(batch.tokens)
    geometry = model.geometry(batch.documents, like=embedded)
    leaf = embedded.detach().requires_grad_(model.heads.reads_tokens)
    walk = _Walk(model, model.context(leaf, geometry), _Terms(model, batch, objective), backward)
    state = model.trunk(embedded[:, : batch.targets.shape[2]], geometry)
    last = walk.pulled(state, walk.descend(TRUNK, state))
    if leaf.grad is not None:
        last = last + walk.pulled(embedded, leaf)
    backward(last)
    return walk.terms.losses()


class _Walk:
    """The sequential schedule's descent through the heads."""

    def __init__(self, model: MtpModel, context: HeadContext, terms: _Terms, backward: Backward) -> None:
        self.model, self.context, self.terms, self.backward = model, context, terms, backward
        self.needed = needed_offsets(model, terms.objective)
        self.main_rms: Tensor | None = None

    def descend(self, offset: int, state: Tensor) -> Tensor:
        """Run everything that depends on a state, (B, T, D); return a leaf that holds the gradient of it."""
        leaf = state.detach().requires_grad_()
        readers = [reader for reader in self.model.heads.readers(offset) if reader in self.needed]
        if offset == 1 and readers and self.terms.objective.is_balanced:
            self._measure_main(leaf)
        for reader in readers:
            hidden = self.model.heads(reader, self.model.read(reader, leaf), self.context)
            gradient = self.descend(reader, hidden)
            if hidden is leaf:  # a main head that is the trunk's output itself, and comes before all other readers
                assert leaf.grad is None
                leaf.grad = gradient.grad
            elif hidden.requires_grad:
                self.backward(self.pulled(hidden, gradient))
        if offset != TRUNK:
            self.backward(self._loss(offset, leaf))
        return leaf

    def _loss(self, offset: int, leaf: Tensor) -> Tensor:
        terms = self.terms.of(offset)
        loss: Tensor = self.model.unembedding(
            [offset] * len(terms), [leaf] * len(terms), terms, balance_to=self.main_rms
        )
        if offset == 1 and self.terms.objective.is_balanced and self.main_rms is None:
            self.main_rms = terms[0].rms()
        return loss

    def pulled(self, state: Tensor, leaf: Tensor) -> Tensor:
        """Scalar whose gradient with respect to `state` is the one that `leaf` has gathered.

        That one bears the loss scale already, and the coming backward pass would multiply by it once more.
        """
        gradient = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
        scale = self.terms.objective.loss_scale
        if scale != 1:
            state, gradient = state.float(), gradient.float() / scale
        return (state * gradient).sum()

    @torch.no_grad()
    def _measure_main(self, leaf: Tensor) -> None:
        """Heads that read the main head go before it: their balance needs its RMS in advance."""
        self._loss(1, leaf)


def bridged(model: MtpModel, batch: MicroBatch, objective: Objective, backward: Backward) -> OffsetLosses:
    """Keep all heads' hidden states, compute every chunked loss in one node, go backward once."""
    terms = _Terms(model, batch, objective)
    hiddens = model.hidden_states(batch.tokens, batch.documents, needed_offsets(model, objective))
    offsets, states, parts = [], [], []
    for offset, hidden in hiddens.items():
        for term in terms.of(offset):
            offsets.append(offset)
            states.append(hidden)
            parts.append(term)
    backward(model.unembedding(offsets, states, parts))
    return terms.losses()


def joint(model: MtpModel, batch: MicroBatch, objective: Objective, backward: Backward) -> OffsetLosses:
    """Compute the loss as defined, on full logits of every head: the oracle of the other two."""
    section, terms = objective.section, _Terms(model, batch, objective)
    total: Tensor | float = 0.0
    main_rms: Tensor | float = 1.0
    hiddens = model.hidden_states(batch.tokens, batch.documents, needed_offsets(model, objective))
    for offset, hidden in hiddens.items():
        logits = model.unembedding.logits(offset, hidden).flatten(0, 1)  # (P, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        targets = batch.targets[offset - 1].flatten()
        losses = reference.cross_entropy(logits, targets, section.label_smoothing, section.z_loss)
        factor = objective.coefficients[offset - 1]
        if objective.is_balanced:
            rms = torch.sqrt(losses.detach().square().sum() / (targets != IGNORE).sum().clamp(min=1))
            main_rms = rms if offset == 1 else main_rms
            factor = factor * main_rms / rms
        total = total + factor * losses.sum()
        terms.record(offset, logits.detach())
    if section.token_order is not None:
        total = total + _joint_token_order(model, batch, objective, hiddens[1])
    assert isinstance(total, Tensor)
    backward(total)
    return terms.losses()


def _joint_token_order(model: MtpModel, batch: MicroBatch, objective: Objective, hidden: Tensor) -> Tensor:
    section, matrix = objective.section.token_order, model.unembedding.token_order
    assert section is not None
    assert matrix is not None
    logits = matrix(model.unembedding.normalize(1, hidden)).to(objective.coefficients.dtype)
    rows = zip(logits, batch.tokens, batch.documents, strict=True)
    losses = [reference.token_order(*row, section.window_tokens).sum() for row in rows]
    return objective.token_order_coefficient * torch.stack(losses).sum()


@torch.no_grad()
def evaluate(model: MtpModel, batch: MicroBatch, objective: Objective) -> OffsetLosses:
    """Losses and predictions of every offset, one after the other, without gradients."""
    terms = _Terms(model, batch, objective)
    for offset, hidden in model.hidden_states(batch.tokens, batch.documents).items():
        part = terms.of(offset)[:1]
        model.unembedding([offset], [hidden], part)
    return terms.losses()


SCHEDULES = {"sequential": sequential, "bridged": bridged, "joint": joint}
