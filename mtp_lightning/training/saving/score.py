"""Which of two checkpoints is better."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

LOSS_TOLERANCE = 0.05


@dataclass(frozen=True)
class CheckpointScore:
    """The figures of a validation that decide."""

    step: int
    mean_acceptance_length: float
    loss: float  # of the main head

    def beats(self, other: "CheckpointScore | None") -> bool:
        """Compare accepted lengths, but only of models whose main heads are about equally good.

        Heads that all say the same token agree perfectly, so a model that has hardly learnt anything has the
        longest accepted length of all. Where one main head's loss is lower by more than the tolerance, that decides.
        """
        if other is None:
            return True
        if max(self.loss, other.loss) > min(self.loss, other.loss) * (1 + LOSS_TOLERANCE):
            return self.loss < other.loss
        own = (self.mean_acceptance_length, -self.loss, self.step)
        return own > (other.mean_acceptance_length, -other.loss, other.step)


def score_of(step: int, metrics: Mapping[str, float]) -> CheckpointScore | None:
    """Score a step by its validation; None without one, or where it is not finite."""
    mean_acceptance_length = metrics.get("val/mean_acceptance_length", math.nan)
    loss = metrics.get("val/loss_1", math.nan)
    if not (math.isfinite(mean_acceptance_length) and math.isfinite(loss)):
        return None
    return CheckpointScore(step, mean_acceptance_length, loss)
