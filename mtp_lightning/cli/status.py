"""`mtp status`."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mtp_lightning.cli.targets import check_page
from mtp_lightning.console.errors import end_without_output, guard_output, screen
from mtp_lightning.errors import visible

if TYPE_CHECKING:
    from mtp_lightning.launch.status import RunStatus

BLANK = "-"


def status(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="DIR", help="Run folders, or folders of them.", show_default="runs", readable=False),
    ] = None,
    *,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(min=0.2, metavar="SECONDS", help="Pause between looks.")] = 5.0,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", callback=check_page, help="Write the page of mtp report, too."),
    ] = None,
) -> None:
    """Show runs: state of the job, step, speed, loss, acceptance length, checkpoint, restarts, time to the end."""
    from mtp_lightning.errors import RunFolderError
    from mtp_lightning.launch.status import statuses

    places = folders or [Path("runs")]
    runs = statuses(places)
    if not runs:
        raise RunFolderError(
            "there must be a run in or beneath the folders that are given",
            f"none in {', '.join(map(str, places))}",
            "Start one with mtp train or mtp submit, or give its folder: mtp status DIR",
        )
    console = screen()
    if html is not None:
        _write_page(runs, html)
    if not watch:
        console.print(status_page(runs), *([] if html is None else [f"written: {html}"]), sep="\n")
        return
    guard_output(end_without_output)  # also with a page: nobody is there any more to end it
    for shown in _shown(screen()):
        shown(status_page(runs))
        time.sleep(every)
        runs = statuses(places)
        if html is not None and runs:
            _write_page(runs, html)


def _shown(console: Console) -> Iterator[Callable[[Group], None]]:
    """Yield again and again what shows a page: over the one before on a terminal, else below it."""
    if not console.is_terminal:
        while True:
            yield console.print
    with Live(console=console, auto_refresh=False) as live:
        while True:
            yield lambda page: live.update(page, refresh=True)


def _write_page(runs: "list[RunStatus]", html: Path) -> None:
    from mtp_lightning.evaluation.run_page.runs import read_runs
    from mtp_lightning.evaluation.run_page.write import write_page

    write_page(read_runs(runs), html)


def status_page(runs: "list[RunStatus]") -> Group:
    """Lay runs out, and below them, line by line, what of their folders cannot be read."""
    faults = [f"{run.path}: {fault}" for run in runs for fault in run.faults]
    return Group(status_table(runs), *(Text(visible(fault, kept="")) for fault in faults))


def status_table(runs: "list[RunStatus]") -> Table:
    """Lay runs out, a row for each."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for name in ("run", "recipe", "job", "state"):
        table.add_column(name, overflow="fold")
    for name in ("step", "tokens", "tokens/s", "loss", "accepted", "checkpoint", "restarts", "ETA"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(*(visible(cell, kept="") for cell in _row(run)))
    return table


def _row(run: "RunStatus") -> list[str]:
    return [
        str(run.path),
        run.name,
        run.job or BLANK,
        run.state,
        f"{run.step:,}/{run.steps:,}" if run.steps else f"{run.step:,}",
        _short(run.tokens),
        _short(run.tokens_per_s),
        BLANK if run.loss is None else f"{run.loss:.3f}",
        BLANK if run.mean_acceptance_length is None else f"{run.mean_acceptance_length:.2f}",
        BLANK if run.checkpoint is None else f"{run.checkpoint:,}",
        str(run.restarts),
        _duration(run.remaining_s),
    ]


def _short(value: float | None) -> str:
    if value is None:
        return BLANK
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return BLANK
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours:02d}:{minutes:02d}" if days else f"{hours}:{minutes:02d}:{rest:02d}"
