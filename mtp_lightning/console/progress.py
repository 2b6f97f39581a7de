"""What the data verbs say: plain lines, and a bar where there is a terminal to draw it on."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mtp_lightning.console.screen import Screen
from mtp_lightning.errors import visible

SECONDS_BETWEEN_LINES = 5.0
Advance = Callable[[int], None]


def say(text: str, *, stderr: bool = False) -> None:
    """Print one line as it is: never wrapped, nothing in it read as markup."""
    print(visible(text), file=sys.stderr if stderr else sys.stdout, flush=True)  # above a live view, if there is one


@contextmanager
def watched(what: str, *, total_bytes: int, show: bool) -> Iterator[Advance]:
    """Yield a function to report bytes to: a bar on a terminal, else a line now and then when it takes long.

    On stderr: stdout may be a text that goes into a pipe.
    """
    console = Screen(stderr=True)
    if not show:
        yield lambda num_bytes: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(what, total=total_bytes)
            yield lambda num_bytes: progress.advance(task, num_bytes)
    else:
        yield lines_now_and_then(what, total_bytes)


@contextmanager
def counted(what: str, *, total: int, unit: str) -> Iterator[Advance]:
    """Yield a function to report things done to, like `watched`."""
    console = Screen(stderr=True)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda num_done: progress.advance(task, num_done)
    else:
        began_at = time.monotonic()

        def line(done: int) -> str:
            left = timedelta(seconds=round((time.monotonic() - began_at) * (total - done) / max(done, 1)))
            return f"{what}: {done:,} of {total:,} {unit}" + (f", {left} left" if done else "")

        yield _now_and_then(line)


def lines_now_and_then(what: str, total_bytes: int) -> Advance:
    """Return a function to report bytes to, which prints a line now and then when it takes long."""
    return _now_and_then(lambda done: f"{what}: {done / 1e6:,.0f} of {total_bytes / 1e6:,.0f} MB")


def _now_and_then(line: Callable[[int], str]) -> Advance:
    num_done = 0
    said_at = time.monotonic()

    def advance(more: int) -> None:
        nonlocal num_done, said_at
        num_done += more
        if time.monotonic() - said_at >= SECONDS_BETWEEN_LINES:
            said_at = time.monotonic()
            say(line(num_done), stderr=True)

    return advance
