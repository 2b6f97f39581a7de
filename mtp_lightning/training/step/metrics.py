"""Metrics of every offset: loss, accuracy, agreement with the main head, acceptance.

Agreement asks whether an offset's argmax equals the main head's argmax for the same token, which the main head
speaks from k-1 positions later. Cumulative acceptance at k is the share of positions at which offsets 2 ... k all
agree; conditional acceptance is cumulative(k) / cumulative(k-1); the acceptance length, 1 + the sum of cumulative
acceptances, is the number of tokens that one step of greedy self-speculation is expected to yield.

Under sampling a draft is accepted with probability sum of min(p, q), the overlap of the main head's distribution p
and the offset's q, which is one minus their total variation. Sampled acceptance at k is the mean product of the
overlaps of offsets 2 ... k, and the sampled length is 1 + the sum of sampled acceptances. Validation measures these.

With a draft vocabulary a loss is the mean over the targets in it; the share of the others is a figure of its own. All
else is over all targets: a token that cannot be drafted is not accepted.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics import Metric

from mtp_lightning.losses.distillation import teacher_positions
from mtp_lightning.losses.targets import IGNORE
from mtp_lightning.model.draft_vocabulary import OUTSIDE
from mtp_lightning.planner.flops import tokens_after
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.step.objective import OffsetLosses


class ThroughputClock:
    """Measures tokens per second since the last logged step, without the time of validations and checkpoints."""

    def __init__(self, recipe: Recipe, step: int) -> None:
        """Start at `step` optimizer steps done."""
        self._recipe, self._step = recipe, step
        self._began_at = time.monotonic()

    def pause(self, spent_s: float) -> None:
        """Subtract `spent_s` (validation, checkpoint) from the time that counts."""
        self._began_at += spent_s

    def lap(self, step: int) -> float:
        """Return tokens per second since the last lap, and begin the next at `step` optimizer steps done."""
        now, tokens = time.monotonic(), tokens_after(self._recipe, step) - tokens_after(self._recipe, self._step)
        spent_s = now - self._began_at
        self._began_at, self._step = now, step
        return tokens / spent_s


class OffsetMetrics(Metric):
    """Sums over micro-batches and ranks; ratios only at the end."""

    full_state_update = False
    nll_sum: Tensor
    num_targets: Tensor
    num_predicted: Tensor
    num_correct: Tensor
    num_agreeing: Tensor
    num_comparable: Tensor
    num_accepted: Tensor
    num_drafted: Tensor
    divergence_sum: Tensor
    num_distilled: Tensor
    overlap_sum: Tensor
    num_sampled: Tensor
    sampled_sum: Tensor
    num_off_text: Tensor
    num_rolled_out: Tensor
    num_outside: Tensor
    router_sum: Tensor
    num_routed: Tensor

    def __init__(self, num_offsets: int) -> None:
        super().__init__()
        self.num_offsets = num_offsets
        zeros = torch.zeros(num_offsets, dtype=torch.float64)
        for name in ("nll_sum", "num_targets", "num_predicted", "num_correct"):
            self.add_state(name, zeros.clone(), dist_reduce_fx="sum")
        for name in ("num_agreeing", "num_comparable", "num_accepted"):
            self.add_state(name, zeros.clone(), dist_reduce_fx="sum")
        self.has_draft_vocabulary = False
        for name in ("divergence_sum", "num_distilled", "overlap_sum", "sampled_sum", "num_outside"):
            self.add_state(name, zeros.clone(), dist_reduce_fx="sum")
        for name in ("num_off_text", "num_rolled_out"):
            self.add_state(name, zeros.clone(), dist_reduce_fx="sum")
        for name in ("num_drafted", "num_sampled", "router_sum", "num_routed"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, targets: Tensor, losses: OffsetLosses) -> None:
        """Add one micro-batch: (N, B, T) targets; losses with or without predictions."""
        is_computed = ~losses.nll_sums.isnan()  # (N,)
        is_valid = (targets != IGNORE) & is_computed[:, None, None]  # (N, B, T)
        self.nll_sum += losses.nll_sums.nan_to_num().to(torch.float64)
        self.num_targets += is_valid.sum((1, 2))
        if losses.is_outside is not None:
            self.has_draft_vocabulary = True
            self.num_outside += (losses.is_outside & is_valid).sum((1, 2))
        if losses.divergence_sums is not None:
            is_distilled = ~losses.divergence_sums.isnan()
            self.divergence_sum += losses.divergence_sums.nan_to_num().to(torch.float64)
            self.num_distilled += teacher_positions(targets).sum((1, 2)) * is_distilled
        if losses.off_text is not None:
            self.num_off_text += losses.off_text.nan_to_num().to(torch.float64)
            self.num_rolled_out += is_valid.sum((1, 2)) * ~losses.off_text.isnan()
        if losses.router_loss is not None:
            self.router_sum += losses.router_loss.to(torch.float64)
            self.num_routed += 1
        if losses.predictions is None:
            return
        self.num_predicted += is_valid.sum((1, 2))
        self.num_correct += ((losses.predictions == targets) & is_valid).sum((1, 2))
        agrees, is_comparable = compare_with_main(losses.predictions, is_valid)
        self.num_agreeing += agrees.sum((1, 2))
        self.num_comparable += is_comparable.sum((1, 2))
        drafted = is_comparable.all(0)  # (B, T)
        self.num_accepted += (agrees.cummin(0).values & drafted).sum((1, 2))
        self.num_drafted += drafted.sum()
        if losses.overlaps is not None:
            self.overlap_sum += (losses.overlaps * is_comparable).sum((1, 2))
            self.sampled_sum += (losses.overlaps.cumprod(0) * drafted).sum((1, 2))
            self.num_sampled += drafted.sum()

    def compute(self) -> dict[str, float]:
        """Return all figures by name, e.g. `loss_2`, `mean_acceptance_length`; NaN where nothing was counted."""
        loss = self.nll_sum / (self.num_targets - self.num_outside)
        accuracy = self.num_correct / self.num_predicted
        agreement = self.num_agreeing / self.num_comparable
        cumulative = self.num_accepted / self.num_drafted
        figures = {}
        for k in range(1, self.num_offsets + 1):
            figures[f"loss_{k}"] = loss[k - 1]
            figures[f"label_accuracy_{k}"] = accuracy[k - 1]
        for k in range(2, self.num_offsets + 1):
            figures[f"agreement_{k}"] = agreement[k - 1]
            figures[f"conditional_acceptance_rate_{k}"] = cumulative[k - 1] / cumulative[k - 2]
            figures[f"acceptance_rate_{k}"] = cumulative[k - 1]
        figures["mean_acceptance_length"] = cumulative.sum()
        if self.has_draft_vocabulary:
            figures |= _by_offset(OUTSIDE, self.num_outside / self.num_targets)
        if self.num_distilled.any():
            figures |= _by_offset("divergence", self.divergence_sum / self.num_distilled)
        if self.num_rolled_out.any():
            off_text = self.num_off_text / self.num_rolled_out
            figures |= {f"off_text_{k}": off_text[k - 1] for k in range(3, self.num_offsets + 1)}
        if self.num_routed:
            figures["router_loss"] = self.router_sum / self.num_routed
        if self.num_sampled:
            sampled = self.sampled_sum / self.num_sampled
            figures |= _by_offset("overlap", self.overlap_sum / self.num_comparable)
            figures |= _by_offset("sampled_acceptance_rate", sampled)
            figures["sampled_acceptance_length"] = sampled.sum()
        values = torch.stack([figure.double() for figure in figures.values()]).tolist()  # one wait for all
        return dict(zip(figures, values, strict=True))


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """What a run measures while it trains and validates, on one device.

    None of it is a child of the LightningModule. What moves and casts a model's modules does so differently under each
    strategy: ZeRO-3 moves none of them, and a cast to fp32 would take half of the sums' digits away.
    """

    train: OffsetMetrics  # since the last logged step
    validation: OffsetMetrics
    by_source: dict[str, OffsetMetrics]  # of validation

    @classmethod
    def on(cls, device: torch.device, recipe: Recipe) -> "RunMetrics":
        """Build a recipe's metrics on a device."""

        def build() -> OffsetMetrics:
            return OffsetMetrics(recipe.heads.num_offsets).to(device)

        return cls(train=build(), validation=build(), by_source={name: build() for name in recipe.data.mixture})


def of_source(figures: dict[str, float], source: str) -> dict[str, float]:
    """Name the figures of one data source; its losses are not known apart.

    >>> of_source({"loss_1": 0.0, "mean_acceptance_length": 2.5}, "code")
    {'mean_acceptance_length@code': 2.5}
    """
    return {f"{name}@{source}": figure for name, figure in figures.items() if not name.startswith("loss_")}


def _by_offset(name: str, figures: Tensor) -> dict[str, Tensor]:
    """Name the figures of the extra offsets."""
    return {f"{name}_{k}": figure for k, figure in enumerate(figures[1:], start=2)}


def compare_with_main(predictions: Tensor, is_valid: Tensor) -> tuple[Tensor, Tensor]:
    """Compare every offset's argmax with the main head's for the same token.

    Args:
        predictions: (N, B, T) argmax of every offset.
        is_valid: (N, B, T) whether the offset has a target there.

    Returns:
        Two (N, B, T): where they agree, and where there is something to compare. Offset 1 agrees with itself.
        The last k-1 positions of offset k have no main head to compare with.
    """
    num_offsets, _, num_positions = predictions.shape
    agrees = torch.zeros_like(is_valid)
    is_comparable = torch.zeros_like(is_valid)
    for k in range(1, num_offsets + 1):
        here, there = slice(0, num_positions - k + 1), slice(k - 1, num_positions)
        is_comparable[k - 1, :, here] = is_valid[k - 1, :, here]
        agrees[k - 1, :, here] = predictions[k - 1, :, here] == predictions[0, :, there]
    return agrees & is_comparable, is_comparable
