"""What both benchmarks put on screen and into files: tables, remarks, progress, JSON."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from mtp_lightning.console.screen import Screen
from mtp_lightning.errors import RunFolderError, refusal_of, remedy_of
from mtp_lightning.files.durable import write_whole

BLANK = "-"
STDOUT = Path("-")  # in place of a file, as other programs have it
PREFIXES = ("", "k", "M", "G", "T", "P", "E")
PLAIN_WIDTH = 100  # where the output is no terminal


class Report(Protocol):
    """Tells the user what is going on."""

    def __call__(self, doing: str, *, done: int) -> None:
        """Name what is being done now, and how many figures are finished."""


def console(*, stderr: bool = False) -> Console:
    """Return a console as wide as the terminal."""
    made = Screen(stderr=stderr)
    if not made.is_terminal:
        made.width = PLAIN_WIDTH
    return made


def build_table(columns: list[str], *, left: int, gap: int) -> Table:
    """Build an empty table of figures, the column at index `left` aligned to the left, `gap` spaces between."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), pad_edge=False, show_edge=False)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index == left else "right", no_wrap=True)
    return table


def number(value: float | None, form: str) -> str:
    """Format a figure, or a blank for one that is missing.

    >>> number(1.5, ".2f"), number(None, ".2f")
    ('1.50', '-')
    """
    return BLANK if value is None else format(value, form)


def scaled(value: float) -> str:
    """Format a large number with its prefix.

    >>> scaled(6.06e11), scaled(1.2e12), scaled(30)
    ('606 G', '1.2 T', '30 ')
    """
    index = min(len(PREFIXES) - 1, max(0, int(math.log10(value)) // 3)) if value > 0 else 0
    return f"{value / 1000**index:.3g} {PREFIXES[index]}"


def ratio(value: float | None, base: float | None) -> float | None:
    """Divide two figures, where both are there.

    >>> ratio(3.0, 2.0), ratio(3.0, None)
    (1.5, None)
    """
    return None if value is None or base is None else value / base


def add_rows(table: Table, rows: list[list[str]]) -> None:
    """Fill a table, with a line between groups of rows that begin with the same number."""
    for index, row in enumerate(rows):
        if index and row[0] != rows[index - 1][0]:
            table.add_section()
        table.add_row(*row)


@contextmanager
def watched(total: int) -> Iterator[Report]:
    """Show progress on stderr: a bar on a terminal, else a line per thing done."""
    err = console(stderr=True)
    if not err.is_terminal:
        yield lambda doing, *, done: err.print(f"{done}/{total} done, now {doing}")
        return
    columns = (
        SpinnerColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda doing, *, done: progress.update(task, description=doing, completed=done)


def write_json(path: Path | None, figures: Any) -> None:
    """Write the figures to a file, if one is asked for."""
    if path is None:
        return
    if path == STDOUT:
        print(json.dumps(figures, indent=2))
        return
    try:
        write_whole(path, json.dumps(figures, indent=2).encode() + b"\n")
    except OSError as error:
        raise RunFolderError(
            "the file for the figures must be writable", refusal_of(error, path), remedy_of(error, "--json")
        ) from error
    console().print(f"Figures written to {path}", soft_wrap=True)
