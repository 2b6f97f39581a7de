"""How far a run is, and its latest figures."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

from mtp_lightning.planner.flops import tokens_after
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.logging.columns import as_number
from mtp_lightning.training.saving.save_checkpoints import CheckpointScore, score_of


@final
@dataclass
class Progress:
    """The state behind the live view; figures are by column name of metrics.csv."""

    recipe: Recipe
    step: int = 0
    train: dict[str, float] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    validated_step: int | None = None
    best: CheckpointScore | None = None
    saved_step: int | None = None
    _clock: tuple[float, int] | None = None  # when, and after which step, the measured part of this attempt began

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.recipe.run.steps

    @property
    def tokens(self) -> int:
        """Tokens of all steps so far."""
        return tokens_after(self.recipe, self.step)

    @property
    def eta_s(self) -> float:
        """Seconds to the last step at this attempt's rate, validations and saves included; NaN at first."""
        if self._clock is None or self.step <= self._clock[1]:
            return math.nan
        began_at, first_step = self._clock
        rate = (self.step - first_step) / max(time.monotonic() - began_at, 1e-9)
        return (self.total_steps - self.step) / rate

    def advance(self, step: int) -> None:
        """Note a finished step; the first of an attempt is warm-up and not measured."""
        self.step = step
        if self._clock is None:
            self._clock = (time.monotonic(), step)

    def take(self, metrics: Mapping[str, Any], step: int) -> None:
        """Take up a row of figures."""
        numbers = {name: number for name, value in metrics.items() if (number := as_number(value)) is not None}
        validation = {name: number for name, number in numbers.items() if name.startswith("val/")}
        train = {name: number for name, number in numbers.items() if name not in validation}
        if "train/loss_1" in train:
            self.train = train
        if validation:
            self.validation, self.validated_step = validation, step
        score = score_of(step, validation)
        if score and score.beats(self.best):
            self.best = score


def bits_unit(recipe: Recipe) -> str:
    """Unit of a loss divided by ln 2."""
    return "bits/byte" if recipe.data.tokenizer == "byte" else "bits/token"
