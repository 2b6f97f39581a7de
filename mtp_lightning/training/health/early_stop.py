"""Ending a run whose acceptance length no longer rises."""

from collections.abc import Mapping
from typing import Any, final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mtp_lightning.checkpoint.format.folder import CheckpointFolder
from mtp_lightning.console.progress import say
from mtp_lightning.recipe.schema.root import EarlyStopSection, Recipe
from mtp_lightning.training.saving.save_checkpoints import LOSS_TOLERANCE, CheckpointScore, score_of


def is_over(recipe: Recipe, checkpoint: CheckpointFolder) -> bool:
    """Tell whether a run has ended with a checkpoint: by its number of steps, or early."""
    if checkpoint.step >= recipe.run.steps:
        return True
    if recipe.run.early_stop is None:
        return False
    state = checkpoint.state()["callbacks"].get(EarlyStop.__qualname__)
    return state is not None and state["num_flat"] >= recipe.run.early_stop.validations


@final
class EarlyStop(Callback):
    """Count validations in a row without a gain; at so many the run ends as if it had reached its last step.

    Attributes:
        num_flat: validations since the last gain; kept in every checkpoint.
    """

    recipe_field = "run.early_stop"

    def __init__(self, section: EarlyStopSection) -> None:
        self.num_flat = 0
        self._section = section
        self._best: CheckpointScore | None = None

    @property
    def is_over(self) -> bool:
        """Tell whether the run has to end."""
        return self.num_flat >= self._section.validations

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End at once where the last checkpoint was the end."""
        trainer.should_stop = self.is_over

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count this validation; all ranks have the same figures."""
        metrics: Mapping[str, Any] = getattr(pl_module, "metrics", {})
        score = score_of(trainer.global_step, {name: float(metrics[name]) for name in metrics})
        if score is None or (self._best is not None and score.step <= self._best.step):
            return
        if self._best is None or self._gains(score, self._best):
            self.num_flat, self._best = 0, score
        else:
            self.num_flat += 1
        if self.is_over and not trainer.should_stop:
            trainer.should_stop = True
            if trainer.is_global_zero:
                say(
                    f"The acceptance length has not risen by {self._section.least_gain} in {self.num_flat} "
                    f"validations: ending after step {trainer.global_step}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Count and best so far."""
        best = self._best
        return {"num_flat": self.num_flat, "best": best and [best.step, best.mean_acceptance_length, best.loss]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.num_flat = state_dict["num_flat"]
        self._best = CheckpointScore(*state_dict["best"]) if state_dict["best"] else None

    def _gains(self, score: CheckpointScore, best: CheckpointScore) -> bool:
        """Compare like scores of checkpoints, which judge acceptance lengths of about equally good main heads only."""
        if max(score.loss, best.loss) > min(score.loss, best.loss) * (1 + LOSS_TOLERANCE):
            return score.loss < best.loss
        return score.mean_acceptance_length > best.mean_acceptance_length + self._section.least_gain
