"""Every row of metrics, into metrics.csv and to the loggers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mtp_lightning.errors import RunFolderError
from mtp_lightning.planner.flops import tokens_after
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.logging.columns import as_number, metric_columns
from mtp_lightning.training.logging.metrics_table import MetricsTable
from mtp_lightning.training.logging.outage import LoggerQueue


@final
class MetricsFiles(Callback):
    """Write one row per logged step, with the figures of a validation at the same step beside those of training.

    A row is held until the next step begins, because a validation may still follow; it is on disk before the
    checkpoint of its step is. After a resume, rows of steps that will be trained again are dropped first.
    """

    def __init__(self, recipe: Recipe, run_folder: Path) -> None:
        columns = metric_columns(recipe.heads.num_offsets, recipe.data.mixture)
        self.table = MetricsTable(run_folder / "metrics.csv", columns)
        self._recipe = recipe
        self._row: dict[str, Any] = {}
        self._queues: list[LoggerQueue] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file where the run goes on."""
        if trainer.is_global_zero:
            self.table.begin(trainer.global_step)
            self._queues = [LoggerQueue(logger) for logger in trainer.loggers]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write the row of the step before."""
        self._write()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take up the step's figures."""
        self._collect(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the validation's figures."""
        if not trainer.sanity_checking:
            self._collect(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Let the rows reach the disk before the checkpoint that resumes after them."""
        self._write()
        self.table.sync()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last row."""
        self._write()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the last row, unless writing is what failed, and close the file."""
        if not isinstance(exception, RunFolderError):
            self._write()
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the file, after the last checkpoint."""
        self._close()

    def _collect(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics: Mapping[str, Any] = getattr(pl_module, "metrics", {})
        if trainer.is_global_zero and metrics:
            step = trainer.global_step
            self._row |= {"step": step, "tokens": tokens_after(self._recipe, step), **metrics}

    def _close(self) -> None:
        """Close the file, and send what loggers have not taken; Lightning then closes them."""
        self.table.close()
        for queue in self._queues:
            queue.close()
        self._queues = []

    def _write(self) -> None:
        row, self._row = self._row, {}
        if not row:
            return
        self.table.append(row)
        metrics = {name: number for name, value in row.items() if (number := as_number(value)) is not None}
        step = int(metrics.pop("step"))
        for queue in self._queues:
            queue.send(step, metrics)
