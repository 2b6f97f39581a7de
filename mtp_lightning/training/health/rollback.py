"""Roll back to the last good checkpoint where too many steps in a row are not finite, and leave their rows out."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast, final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mtp_lightning.checkpoint.format.commit import read_pointer
from mtp_lightning.checkpoint.format.folder import CheckpointFolder, newest_complete
from mtp_lightning.console.progress import say
from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.errors import NonFiniteError
from mtp_lightning.files.durable import replace_durably
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe.schema.root import NonFiniteSection
from mtp_lightning.training.step.skipped_steps import EXPECTED, HINT, RECORDS, NonFiniteStreak, Rollback, read_rollbacks
from mtp_lightning.training.strategies.base import RunStrategy


def roll_back(run_folder: Path, section: NonFiniteSection, streak: NonFiniteStreak) -> CheckpointFolder | None:
    """Note durably which rows the run leaves out from now on; return the checkpoint to go on from, if there is one.

    These are the rows of the steps that were not finite. A second time at the same checkpoint they are not the reason:
    then that checkpoint is set aside for the one before, and all rows since are left out. All ranks call it.

    Raises:
        NonFiniteError: The run has gone back as often as it may.
    """
    ranks = Ranks()
    found: CheckpointFolder | None = None
    with ranks.raise_on_all_ranks():
        if ranks.is_first:
            records = read_rollbacks(run_folder)
            if len(records) >= section.rollbacks:
                raise NonFiniteError(
                    EXPECTED, f"{streak.found}, after {len(records)} of {section.rollbacks} rollbacks", HINT
                )
            found, record = _chosen(run_folder, records, streak)
            content = json.dumps([asdict(own) for own in (*records, record)], indent=1)
            replace_durably(run_folder / RECORDS, content.encode() + b"\n")
            say(
                f"Rolling back to step {record.checkpoint} ({len(records) + 1} of {section.rollbacks} times): "
                f"{streak.found}. Rows {record.first:,} to {record.first + record.count - 1:,} of the run are left out"
            )
    chosen: CheckpointFolder | None = ranks.broadcast(found)
    return chosen


def _chosen(
    run_folder: Path, records: Sequence[Rollback], streak: NonFiniteStreak
) -> tuple[CheckpointFolder | None, Rollback]:
    """Choose where to go on, and what to leave out."""
    folder = run_folder / "checkpoints"
    newest = newest_complete(folder)
    is_again = bool(records) and records[-1].checkpoint == (newest.step if newest else 0)
    if is_again and newest is not None:
        _set_aside(newest, f".nonfinite-{len(records)}")
        newest = newest_complete(folder)
    consumed = _rows_consumed(newest) if newest else 0
    first = consumed if is_again else max(consumed, streak.first_row)
    step = newest.step if newest else 0
    return newest, Rollback(step=streak.step, checkpoint=step, first=first, count=streak.end_row - first)


def _set_aside(checkpoint: CheckpointFolder, ending: str) -> None:
    """Rename a checkpoint that no run can go on from, and let no pointer name it."""
    folder, name = checkpoint.path.parent, checkpoint.path.name
    for kind in ("last", "best"):
        if read_pointer(folder, kind) == checkpoint.path:
            (folder / kind).unlink()
    checkpoint.path.rename(folder / (name + ending))
    say(f"Nothing finite comes after {name}: it is now called {name}{ending}")


def _rows_consumed(checkpoint: CheckpointFolder) -> int:
    return int(checkpoint.state()[MtpDataModule.__qualname__]["rows_consumed"])


@final
class Rollbacks(Callback):
    """Leave the rows of every recorded rollback out, also after a restart, and count rollbacks in the metrics.

    A checkpoint knows how many of them its data position takes into account; the others are still to be left out.
    """

    def __init__(self, run_folder: Path) -> None:
        self._run_folder = run_folder
        self._records: Sequence[Rollback] = ()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read the record; a run without a checkpoint begins with it."""
        ranks = cast(RunStrategy, trainer.strategy).ranks
        with ranks.raise_on_all_ranks():
            own = read_rollbacks(self._run_folder) if ranks.is_first else []
        self._records = ranks.broadcast(own)
        if trainer.ckpt_path is None:
            self._leave_out(trainer, self._records)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what was recorded after the checkpoint; the data position is in place by now."""
        num_known = checkpoint["callbacks"].get(self.state_key, {}).get("num_left_out", 0)
        self._leave_out(trainer, self._records[num_known:])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count them on logged steps."""
        metrics: dict[str, float] = getattr(pl_module, "metrics", {})
        if metrics:
            metrics["rollbacks"] = len(self._records)

    def state_dict(self) -> dict[str, Any]:
        """How many rollbacks the data position takes into account: all."""
        return {"num_left_out": len(self._records)}

    def _leave_out(self, trainer: Trainer, records: Sequence[Rollback]) -> None:
        data = cast(MtpDataModule, trainer.datamodule)  # type: ignore[attr-defined]
        for record in records:
            data.skip_rows(record.first, record.count)
