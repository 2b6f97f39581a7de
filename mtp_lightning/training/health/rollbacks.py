"""Rows that a run leaves out since it has gone back behind losses that were not finite."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.training.health.rollback import Rollback, read_rollbacks
from mtp_lightning.training.strategies.base import RunStrategy


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
        with ranks.agreeing():
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
