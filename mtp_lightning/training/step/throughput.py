"""Tokens per second between logged steps."""

import time

from mtp_lightning.planner.flops import tokens_after
from mtp_lightning.recipe.schema.root import Recipe


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
