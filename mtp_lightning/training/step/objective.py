"""What a training step computes with and what comes of it: rows, objective, losses."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_lightning.recipe.schema.objective import ObjectiveSection


class MicroBatch(NamedTuple):
    """Rows that go through the model together."""

    tokens: Tensor  # (B, T+n)
    documents: Tensor  # (B, T+n)
    targets: Tensor  # (N, B, T)
    sources: Tensor | None = None  # (B,) which source of a mixture a held-out row comes from


@dataclass(frozen=True)
class Objective:
    """What a micro-batch's loss is made of: recipe, weights of this step, counts of this global batch."""

    section: ObjectiveSection
    weights: list[float]  # one per offset, on the host: an offset of weight 0 is not computed
    counts: Tensor  # (N,) valid targets of the whole global batch
    num_ordered: Tensor | None = None  # positions of the global batch that have a token-order target
    predicts: bool = False  # also take the argmax of every offset
    num_ranks: int = 1  # that the strategy averages gradients over, where the loss is a sum over all of them
    teacher_counts: Tensor | None = None  # (N,) positions of the whole global batch that have a teacher
    loss_scale: float = 1.0  # that each backward pass multiplies gradients by (fp16)
    taught: list[float] | None = None  # the weights of those offsets that have a target in this global batch

    @cached_property
    def coefficients(self) -> Tensor:
        """Factor of each offset's loss sum: weight x ranks / count, (N,)."""
        exact = torch.float64 if self.counts.dtype == torch.float64 else torch.float32
        weights = torch.tensor(self.weights, dtype=exact, device=self.counts.device)
        return self.num_ranks * weights / self.counts.clamp(min=1)

    @cached_property
    def distill_weights(self) -> Tensor:
        """What divergences count for beside the cross-entropy, (N,): beta x its count / count of teachers."""
        distill, teacher_counts = self.section.distill, self.teacher_counts
        assert distill is not None
        assert teacher_counts is not None
        betas = [0.0, *(distill.beta_of(offset) for offset in range(2, len(self.counts) + 1))]
        return self.coefficients.new_tensor(betas) * self.counts / teacher_counts.clamp(min=1)

    @cached_property
    def token_order_coefficient(self) -> Tensor:
        """Factor of the token-order loss sum, 0-dimensional."""
        section, num_ordered = self.section.token_order, self.num_ordered
        assert section is not None
        assert num_ordered is not None
        return self.num_ranks * section.weight / num_ordered.to(self.coefficients.dtype).clamp(min=1)

    @property
    def teaches(self) -> bool:
        """Tell whether there is anything to learn from this global batch."""
        has_order = self.section.token_order is not None and bool(self.num_ordered)
        return self.taught is None or any(self.taught) or has_order

    @property
    def is_balanced(self) -> bool:
        """Tell whether extra losses are scaled to the main head's RMS."""
        return self.section.balance == "rms"


class OffsetLosses(NamedTuple):
    """Unweighted results of a micro-batch; NaN where an offset was not computed."""

    nll_sums: Tensor  # (N,) sum of -log p(target)
    predictions: Tensor | None  # (N, B, T) argmax of every offset
    divergence_sums: Tensor | None = None  # (N,) sum of divergences from the teacher
    overlaps: Tensor | None = None  # (N, B, T) sum of min(p, q) with the main head for the same token

    def of_rows(self, chosen: Tensor) -> "OffsetLosses":
        """Keep what is known position by position of some rows, chosen by a (B,) mask; sums of losses become zero."""
        predictions, overlaps = (
            None if kept is None else kept[:, chosen] for kept in (self.predictions, self.overlaps)
        )
        return OffsetLosses(
            torch.zeros_like(self.nll_sums).where(~self.nll_sums.isnan(), torch.nan), predictions, None, overlaps
        )
