"""Every row of metrics, into metrics.csv and to the loggers."""

import contextlib
import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO, final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mtp_lightning.errors import RunFolderError, refusal_of
from mtp_lightning.files.durable import force, replace_durably
from mtp_lightning.planner.flops import tokens_after
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.logging.columns import as_number, metric_columns
from mtp_lightning.training.logging.loggers import LoggerQueue

Row = dict[str, int | float]


@final
class MetricsTable:
    """The file while a run writes it; one row per step, cells empty where there is no figure."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self._columns = columns
        self._file: TextIO | None = None

    def begin(self, last_step: int) -> None:
        """Open the file for the steps after `last_step`, dropping what an earlier attempt wrote of those."""
        with _writing(self.path):
            kept = [row for row in read_rows(self.path) if row["step"] <= last_step]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = self._line({name: name for name in self._columns}) + "".join(map(self._line, kept))
            replace_durably(self.path, text.encode())
            self._file = self.path.open("a", newline="")

    def append(self, row: Mapping[str, object]) -> None:
        """Write the row of a later step than all before, and hand it to the system."""
        assert self._file is not None
        numbers = {name: as_number(value) for name, value in row.items()}
        with _writing(self.path):
            self._file.write(self._line(numbers))
            self._file.flush()

    def sync(self) -> None:
        """Force all rows to disk."""
        if self._file is not None:
            with _writing(self.path):
                force(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a row that could not be handed over has been reported
                self._file.close()
            self._file = None

    def _line(self, row: Mapping[str, object]) -> str:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(_cell(row.get(name)) for name in self._columns)
        return line.getvalue()


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a metrics.csv without their empty cells; a row that a kill cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(errors="replace").splitlines(keepends=True)
    complete = [line for line in lines if line.endswith("\n")]
    header, *cells = csv.reader(complete) if complete else [[]]
    return [row for values in cells if len(values) == len(header) and "step" in (row := _row(header, values))]


def _row(header: list[str], values: list[str]) -> Row:
    row: Row = {}
    for name, value in zip(header, values, strict=True):
        number = as_number(value)
        if number is not None:
            row[name] = int(number) if name in ("step", "tokens") and math.isfinite(number) else number
    return row


def _cell(value: object) -> object:
    return format(value, ".9g") if isinstance(value, float) else "" if value is None else value


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"metrics must be written to {path}",
            refusal_of(error, path),
            "Make room or repair access, then run the same command again: complete checkpoints are untouched",
        ) from error


@final
class MetricsFiles(Callback):
    """Write one row per logged step, with the figures of a validation at the same step beside those of training.

    A row is held until the next step begins, because a validation may still follow; it is on disk before the
    checkpoint of its step is. After a resume, rows of steps that will be trained again are dropped first.
    """

    def __init__(self, recipe: Recipe, run_folder: Path) -> None:
        drafts = recipe.heads.draft_vocabulary is not None
        columns = metric_columns(recipe.heads.num_offsets, recipe.data.mixture, has_draft_vocabulary=drafts)
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
