"""metrics.csv: written row by row, cut back on resume, read for the summary and the picture."""

import contextlib
import csv
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO, final

from mtp_lightning.errors import RunFolderError
from mtp_lightning.files.durable import replace_durably
from mtp_lightning.training.logging.columns import as_number

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
                os.fsync(self._file.fileno())

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
            str(error.strerror or error),
            "Make room or repair access, then run the same command again: complete checkpoints are untouched",
        ) from error
