"""The learning rate of every step, as a pure function of the recipe: what training sets and `--plot-lr` shows."""

import math
from collections.abc import Callable, Mapping

from mtp_lightning.recipe.schema.root import OptimizerSection

TIMESCALE = 10_000  # of inverse_sqrt without warm-up, as in transformers

DECAYS: Mapping[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "1-sqrt": lambda done: 1 - math.sqrt(done),
}
"""What is left of the way from the peak to the least rate, by the share of the decay that is done."""


def learning_rate(section: OptimizerSection, step: int, num_steps: int) -> float:
    """Learning rate of a 0-based step: linear warm-up to the peak, then the schedule.

    Every schedule but `constant` and `inverse_sqrt` ends at min_lr_ratio x peak in the last step.

    >>> section = OptimizerSection(lr=1.0, warmup_steps=2, min_lr_ratio=0.1)
    >>> [round(learning_rate(section, step, 5), 3) for step in range(5)]
    [0.5, 1.0, 0.775, 0.325, 0.1]
    """
    start = section.rewarm_at
    if start is None or step < start:
        return section.lr * _scheduled(section, step, num_steps)
    return section.lr * _warmed(section, step - start) * _scheduled(section, step, num_steps)


def decay_steps(section: OptimizerSection, num_steps: int) -> int:
    """Count the steps of the decay at the end of a run under `wsd`.

    >>> decay_steps(OptimizerSection(decay_fraction=0.25), 10)
    2
    """
    return round(section.decay_fraction * num_steps)


def _warmed(section: OptimizerSection, step: int) -> float:
    """Share of the peak that warm-up has reached in a step; 1 after it."""
    done = min(1.0, (step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
    return section.warmup_from + (1 - section.warmup_from) * done


def _scheduled(section: OptimizerSection, step: int, num_steps: int) -> float:
    """Share of the peak in a step, but for a second warm-up."""
    warmup, least = section.warmup_steps, section.min_lr_ratio
    if step < warmup:
        return _warmed(section, step)
    if section.schedule == "constant":
        return 1.0
    if section.schedule == "inverse_sqrt":
        timescale = warmup or TIMESCALE
        return max(least, math.sqrt(timescale / (step + 1 + timescale - warmup)))
    decay = DECAYS[section.decay_shape if section.schedule == "wsd" else section.schedule]
    length = decay_steps(section, num_steps) if section.schedule == "wsd" else num_steps - warmup
    done = (step + 1 - num_steps + length) / max(1, length)
    return least + (1 - least) * decay(min(1.0, max(0.0, done)))
