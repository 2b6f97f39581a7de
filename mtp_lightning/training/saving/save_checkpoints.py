"""Saving by step and clock, and which checkpoint is the best: by mean acceptance length, then the main head's loss."""

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mtp_lightning.checkpoint.format.commit import (
    keeping_up,
    partial_path,
    read_pointer,
    remove_leftovers,
    retain,
    save_collectively,
    write_pointer,
)
from mtp_lightning.checkpoint.format.folder import complete_checkpoints, name_of_step
from mtp_lightning.checkpoint.format.manifest import RunMetadata, SavePoint
from mtp_lightning.errors import MtpError
from mtp_lightning.launch.run_marker import is_run
from mtp_lightning.planner.flops import tokens_after
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe import Recipe, recipe_hash, recipe_to_yaml
from mtp_lightning.training.lightning_module import MtpLightningModule
from mtp_lightning.training.run_folder import note_saved
from mtp_lightning.training.saving.snapshot import BackgroundWriter, Snapshot, rng_state, set_rng_state
from mtp_lightning.training.strategies.base import RunStrategy

LOSS_TOLERANCE = 0.05


@dataclass(frozen=True)
class CheckpointScore:
    """The figures of a validation that decide."""

    step: int
    mean_acceptance_length: float
    loss: float  # of the main head

    def beats(self, other: "CheckpointScore | None") -> bool:
        """Compare acceptance lengths, but only of models whose main heads are about equally good.

        Heads that all say the same token agree perfectly, so a model that has hardly learnt anything has the
        longest acceptance length of all. Where one main head's loss is lower by more than the tolerance, that decides.
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


@final
class Checkpoints(Callback):
    """Commit a checkpoint when it is due by `checkpoint.every_steps` or `every_minutes`, and after the last step.

    A due step is saved right before the next step begins (or when training ends): its validation is over by then,
    the data position has moved, and the generators are in the very state that the next step will find. Lightning
    offers no earlier moment that comes after both the step and a validation that may or may not follow it. The time
    since the last save is the first rank's; it tells the others in the reduction of each step (`step/vote.py`).

    Attributes:
        last_step: step of the newest checkpoint, the one resumed from included.
        best: score of the best checkpoint on disk; only one with a validation at its own step has a score.
        seconds_saving: time that training stood still for saving, over all attempts as far as known.
    """

    def __init__(self, recipe: Recipe, folder: Path, *, layers: Mapping[str, int]) -> None:
        self.folder = folder
        self.last_step: int | None = None
        self.best: CheckpointScore | None = None
        self.seconds_saving = 0.0
        self._recipe = recipe
        self._layers = layers
        self._is_of_run = False
        self._due_step: int | None = None
        self._saved_at = 0.0
        self._validated: tuple[int, dict[str, float]] = (-1, {})
        self._rng_of_ranks: list[dict[str, Any]] = []
        self._writer: BackgroundWriter | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Clear away what an interrupted save left, and look for the best so far."""
        self._is_of_run = is_run(self.folder.parent)  # not of a Trainer of one's own
        if trainer.is_global_zero:
            remove_leftovers(self.folder)
        self.look_for_best()

    def look_for_best(self) -> None:
        """Compare the scores of the checkpoints on disk."""
        for found in complete_checkpoints(self.folder):
            score = score_of(found.step, found.metrics)
            self.best = score if score and score.beats(self.best) else self.best

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Know the checkpoint that was resumed from, if it is one of this run, and start the clock."""
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            cast(MtpLightningModule, pl_module).step_vote.own_save_due = self._is_due_by_clock
        if (self.folder / name_of_step(trainer.global_step)).exists():
            self.last_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save the step before if it is due; on the first step after a resume, restore the generators.

        While steps are skipped because they are not finite a save waits: the weights may be the reason.
        """
        if self._rng_of_ranks:
            if trainer.global_rank < len(self._rng_of_ranks):
                set_rng_state(self._rng_of_ranks[trainer.global_rank])
            self._rng_of_ranks = []
        skipped = getattr(pl_module, "skipped_steps", None)
        if self._due_step is not None and not (skipped and skipped.in_row):
            self.save(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note that a step is due."""
        step, vote = trainer.global_step, cast(MtpLightningModule, pl_module).step_vote
        if (self._recipe.checkpoint.is_due(step) or vote.save_due) and step != self.last_step:
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
        self.finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let a checkpoint that is being written become complete; the exception goes first if it cannot."""
        with contextlib.suppress(MtpError):
            self.finish(trainer)

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
        return {"rng_of_ranks": Ranks().gather(rng_state()), "seconds_saving": self.seconds_saving}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the generators' states; they are set when the first step begins, after all set-up has drawn."""
        self._rng_of_ranks = state_dict["rng_of_ranks"]
        self.seconds_saving = state_dict["seconds_saving"]

    def save(self, trainer: Trainer) -> None:
        """Save the steps done so far, unless they are saved already; all ranks must call it.

        Raises:
            CheckpointError: it, or the one before it, could not be written; earlier checkpoints are untouched.
        """
        step = trainer.global_step
        self._due_step = None
        if step in (0, self.last_step):
            return
        began_at = time.monotonic()
        strategy = cast(RunStrategy, trainer.strategy)
        writer = self._writer_of(trainer)
        writer.wait()  # before anything is copied: no two copies at a time
        trainer.save_checkpoint(partial_path(self.folder, step))  # the strategy captures what Lightning would save
        snapshot = Snapshot(strategy, copied=writer.in_background)
        point = self._save_point(step)
        best = self._best_after(point)
        writer.run(partial(self._commit, strategy.ranks.size, point, snapshot, best))
        self.last_step, self._saved_at = step, time.monotonic()
        self._account(trainer, time.monotonic() - began_at)

    def finish(self, trainer: Trainer) -> None:
        """Return when every checkpoint is complete.

        Raises:
            CheckpointError: the last one could not be written.
        """
        if self._writer is not None:
            began_at = time.monotonic()
            self._writer.wait()
            self._account(trainer, time.monotonic() - began_at)

    def point_at(self, step: int) -> None:
        """Let `last` and `best` name what they should after a run that ended with this step, if they do not."""
        best = name_of_step(self.best.step) if self.best else None
        for kind, name in (("last", name_of_step(step)), ("best", best)):
            if name is not None and read_pointer(self.folder, kind) != self.folder / name:
                write_pointer(self.folder, kind, name)

    def _is_due_by_clock(self) -> bool:
        minutes = self._recipe.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def _writer_of(self, trainer: Trainer) -> BackgroundWriter:
        if self._writer is None:
            choice = self._recipe.checkpoint.in_background
            is_on_gpu = trainer.lightning_module.device.type == "cuda"
            self._writer = BackgroundWriter(in_background=is_on_gpu if choice is None else choice)
        return self._writer

    def _account(self, trainer: Trainer, spent_s: float) -> None:
        self.seconds_saving += spent_s
        cast(MtpLightningModule, trainer.lightning_module).throughput.pause(spent_s)

    def _save_point(self, step: int) -> SavePoint:
        validated_step, figures = self._validated
        metrics = figures if validated_step == step else {}
        return SavePoint(step=step, tokens=tokens_after(self._recipe, step), metrics=metrics)

    def _best_after(self, point: SavePoint) -> CheckpointScore | None:
        """Return the best score, this point's included, and remember it."""
        score = score_of(point.step, point.metrics)
        if score is not None and score.beats(self.best):
            self.best = score
        return self.best

    def _commit(
        self, num_ranks: int, point: SavePoint, snapshot: Snapshot, best: CheckpointScore | None, ranks: Ranks
    ) -> None:
        """Write a checkpoint with all ranks, point at it, and delete what is no longer needed."""
        metadata = RunMetadata(
            recipe_hash=recipe_hash(self._recipe),
            num_offsets=self._recipe.heads.num_offsets,
            layers=self._layers,
            world_size=num_ranks,
            strategy=self._recipe.strategy.kind,
            recipe_text=recipe_to_yaml(self._recipe),
        )
        save_collectively(ranks, self.folder, point, metadata, snapshot.write)
        with ranks.raise_on_all_ranks(), keeping_up(self.folder, name_of_step(point.step)):
            if ranks.is_first:
                if self._is_of_run:
                    note_saved(self.folder.parent, point.step, metadata.recipe_text)
                self._point(name_of_step(point.step), name_of_step(best.step) if best else None)

    def _point(self, name: str, best_name: str | None) -> None:
        write_pointer(self.folder, "last", name)
        if name == best_name:
            write_pointer(self.folder, "best", name)
        section = self._recipe.checkpoint
        retain(self.folder, keep=section.keep, best=best_name, is_permanent=section.is_permanent)
