"""Saving by step, and knowing the best."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mtp_lightning.checkpoint.commit import partial_path, remove_leftovers, retain, saving, write_pointer
from mtp_lightning.checkpoint.layout import complete_checkpoints, name_of_step
from mtp_lightning.checkpoint.manifest import Moment, RunFacts
from mtp_lightning.recipe import Recipe, recipe_hash
from mtp_lightning.training.callbacks.rng import rng_states_of_ranks, set_rng_state
from mtp_lightning.training.callbacks.score import Score, score_of


@final
class Checkpoints(Callback):
    """Commit a checkpoint after every `run.checkpoint_every_steps` optimizer steps and after the last one.

    A due step is saved right before the next step begins (or when training ends): its validation is over by then,
    the data position has moved, and the generators are in the very state that the next step will find. Lightning
    offers no earlier moment that comes after both the step and a validation that may or may not follow it.

    Attributes:
        last_step: step of the newest checkpoint, the one resumed from included.
        best: score of the best checkpoint on disk; only one with a validation at its own step has a score.
        seconds_saving: time spent in saving, over all attempts as far as known.
    """

    def __init__(self, recipe: Recipe, folder: Path, *, layers: Mapping[str, int]) -> None:
        self.folder = folder
        self.last_step: int | None = None
        self.best: Score | None = None
        self.seconds_saving = 0.0
        self._recipe = recipe
        self._layers = layers
        self._due_step: int | None = None
        self._validated: tuple[int, dict[str, float]] = (-1, {})
        self._rng_of_ranks: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Clear away what an interrupted save left, and look for the best so far."""
        if trainer.is_global_zero:
            remove_leftovers(self.folder)
        for found in complete_checkpoints(self.folder):
            score = score_of(found.step, found.manifest.metrics)
            self.best = score if score and score.beats(self.best) else self.best

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Know the checkpoint that was resumed from, if it is one of this run."""
        if (self.folder / name_of_step(trainer.global_step)).exists():
            self.last_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save the step before if it is due; on the first step after a resume, restore the generators."""
        if self._rng_of_ranks:
            if trainer.global_rank < len(self._rng_of_ranks):
                set_rng_state(self._rng_of_ranks[trainer.global_rank])
            self._rng_of_ranks = []
        if self._due_step is not None:
            self.save(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note that a step is due."""
        step = trainer.global_step
        if step % self._recipe.run.checkpoint_every_steps == 0 and step != self.last_step:
            self._due_step = step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the validation's figures for the checkpoint of the same step."""
        if trainer.sanity_checking:
            return
        metrics: Mapping[str, Any] = getattr(pl_module, "metrics", {})
        figures = {name: float(figure) for name, figure in metrics.items() if name.startswith("val/")}
        self._validated = (trainer.global_step, figures)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step, whether it is due or not."""
        self.save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make Lightning's batch counters say: this step and its validation are over, the next has not begun.

        Lightning 2.6 repeats or skips a validation, or miscounts by one per resume, depending on the hook that a
        checkpoint was taken in. Can go when its counters no longer depend on the hook.
        """
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for part in ("total", "current"):
            completed = progress[part]["completed"]
            progress[part].update(ready=completed, started=completed, processed=completed)
        progress["is_last_batch"] = False

    def state_dict(self) -> dict[str, Any]:
        """Generators of every rank, and the time spent."""
        return {"rng_of_ranks": rng_states_of_ranks(), "seconds_saving": self.seconds_saving}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the generators' states; they are set when the first step begins, after all set-up has drawn."""
        self._rng_of_ranks = state_dict["rng_of_ranks"]
        self.seconds_saving = state_dict["seconds_saving"]

    def save(self, trainer: Trainer) -> None:
        """Commit a checkpoint of the steps done so far, unless there is one; all ranks must call it.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are untouched.
        """
        step = trainer.global_step
        self._due_step = None
        if step in (0, self.last_step):
            return
        began_at = time.monotonic()
        moment = self._moment(step)
        if trainer.is_global_zero:
            facts = RunFacts(
                recipe_hash=recipe_hash(self._recipe),
                num_offsets=self._recipe.heads.num_offsets,
                layers=self._layers,
                world_size=trainer.world_size,
            )
            with saving(self.folder, moment, facts) as partial:
                trainer.save_checkpoint(partial)
        else:
            trainer.save_checkpoint(partial_path(self.folder, step))
        self.last_step = step
        self._point(trainer, moment)
        spent_s = time.monotonic() - began_at
        self.seconds_saving += spent_s
        exclude_time = getattr(trainer.lightning_module, "exclude_time", None)
        if exclude_time is not None:
            exclude_time(spent_s)

    def _moment(self, step: int) -> Moment:
        tokens_per_step = self._recipe.batch.rows * self._recipe.data.window_tokens
        validated_step, figures = self._validated
        metrics = figures if validated_step == step else {}
        return Moment(step=step, tokens=step * tokens_per_step, metrics=metrics)

    def _point(self, trainer: Trainer, moment: Moment) -> None:
        """Update the pointers, then delete what is no longer needed."""
        score = score_of(moment.step, moment.metrics)
        is_best = score is not None and score.beats(self.best)
        if is_best:
            self.best = score
        if not trainer.is_global_zero:
            return
        write_pointer(self.folder, "last", name_of_step(moment.step))
        if is_best:
            write_pointer(self.folder, "best", name_of_step(moment.step))
        best_name = name_of_step(self.best.step) if self.best else None
        retain(self.folder, keep=self._recipe.run.keep_checkpoints, best=best_name)
