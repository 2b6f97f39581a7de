"""metrics.csv and TensorBoard events."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mtp_lightning.errors import RunFolderError
from mtp_lightning.planner.flops import tokens_after
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.logging.columns import as_number, metric_columns
from mtp_lightning.training.logging.metrics_table import MetricsTable

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


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
        self._events_folder = run_folder / "tensorboard"
        self._events: SummaryWriter | None = None
        self._row: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open both files where the run goes on."""
        if not trainer.is_global_zero:
            return
        self.table.begin(trainer.global_step)
        from torch.utils.tensorboard import SummaryWriter  # costs a second that `mtp --help` must not pay

        is_continued = any(self._events_folder.glob("events.*"))
        purge_step = trainer.global_step + 1 if is_continued else None
        self._events = SummaryWriter(str(self._events_folder), purge_step=purge_step)

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
        """Write the last row, unless writing is what failed, and close the files."""
        if not isinstance(exception, RunFolderError):
            self._write()
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the files."""
        self._close()

    def _collect(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics: Mapping[str, Any] = getattr(pl_module, "metrics", {})
        if trainer.is_global_zero and metrics:
            step = trainer.global_step
            self._row |= {"step": step, "tokens": tokens_after(self._recipe, step), **metrics}

    def _close(self) -> None:
        self.table.close()
        if self._events is not None:
            with contextlib.suppress(OSError):  # an event that could not be written has been reported
                self._events.close()
            self._events = None

    def _write(self) -> None:
        row, self._row = self._row, {}
        if not row:
            return
        self.table.append(row)
        if self._events is not None:
            self._write_events(self._events, row)

    def _write_events(self, events: "SummaryWriter", row: Mapping[str, Any]) -> None:
        try:
            for name, value in row.items():
                number = as_number(value)
                if number is not None and name != "step":
                    events.add_scalar(name, number, row["step"])
            events.flush()
        except OSError as error:
            raise RunFolderError(
                f"events must be written to {self._events_folder}",
                str(error.strerror or error),
                "Make room or repair access, then run the same command again",
            ) from error
