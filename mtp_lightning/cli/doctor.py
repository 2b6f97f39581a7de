"""`mtp doctor`: the machine and its packages, and every strategy against plain torch."""

import os
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from mtp_lightning.console.tables import build_table, console

if TYPE_CHECKING:
    from mtp_lightning.diagnostics.parity import Outcome


LABEL = 15
PACKAGES = ("mtp_lightning", "torch", "lightning", "deepspeed")
COMPILERS = ("c++", "g++", "clang++")
MOST_NAMED = 5  # failing cells
TOLD_EVERY = 10  # cells


def print_machine() -> None:
    """Print versions, devices, CPUs and whether there is a compiler."""
    lines = {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    lines |= {"devices": _devices(), "CPUs": str(len(os.sched_getaffinity(0))), "C++ compiler": _compiler()}
    screen = console()
    for label, text in lines.items():
        screen.print(Text.assemble((label.ljust(LABEL), "cyan"), text), soft_wrap=True)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _devices() -> str:
    import torch

    if not torch.cuda.is_available():
        return "CPU only" if torch.version.cuda is None else f"CPU only (torch is built for CUDA {torch.version.cuda})"
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in found]
    return "; ".join(f"{len(list(same))} x {name}" for name, same in groupby(sorted(names)))


def _compiler() -> str:
    found = next(filter(None, map(shutil.which, [os.environ.get("CXX", COMPILERS[0]), *COMPILERS])), None)
    return found or "none: memory.compile=true will not work"


def compare_as_rank(cells_path: Path, results: Path) -> None:
    """Run the cells of a file on as many ranks as there are, this process being one of them."""
    from mtp_lightning.diagnostics.parity import Outcome, compare_all, read_cells
    from mtp_lightning.launch.rank_env import rank_from_env

    rank_info = rank_from_env(os.environ)
    num_ranks = rank_info.num_ranks if rank_info else 1
    cells = read_cells(cells_path)
    noun = "rank" if num_ranks == 1 else "ranks"

    def show(done: int, outcome: Outcome) -> None:
        if not outcome.is_good:
            print(f"not equal: {outcome.cell}", file=sys.stderr, flush=True)
        if done % TOLD_EVERY == 0 or done == len(cells):
            print(f"{num_ranks} {noun}: {done} of {len(cells)} cells", file=sys.stderr, flush=True)

    compare_all(cells, results, show)


def print_outcomes(outcomes: "Sequence[Outcome]") -> bool:
    """Print a row per stage, number of ranks and backward order, then the first failed cells; tell whether none has."""
    from mtp_lightning.diagnostics.parity import LOSS_TOLERANCE, TOLERANCE

    table = build_table(["stage", "ranks", "backward order", "cells", "gradients", "weights", "losses"], left=2, gap=2)
    for (stage, ranks, backward_order), group in groupby(
        sorted(outcomes, key=lambda o: (o.cell.stage, o.cell.ranks)),  # stable: backward orders stay in their order
        key=lambda o: (o.cell.stage, o.cell.ranks, o.cell.backward_order),
    ):
        row = list(group)
        failed = any(outcome.failure for outcome in row)
        errors = [
            _error(max(outcome.gradients for outcome in row), TOLERANCE, failed=failed),
            _error(max(outcome.weights for outcome in row), TOLERANCE, failed=failed),
            _error(max(outcome.losses for outcome in row), LOSS_TOLERANCE, failed=failed),
        ]
        table.add_row(stage, str(ranks), backward_order, str(len(row)), *errors)
    screen = console()
    screen.print(Text("Worst relative error against plain torch on one process", style="bold"), table, "", sep="\n")
    bad = [outcome for outcome in outcomes if not outcome.is_good]
    verdict = f"{len(bad)} of {len(outcomes)} cells are not equal" if bad else f"All {len(outcomes)} cells are equal"
    within = f"{TOLERANCE:.0e} for gradients and weights, {LOSS_TOLERANCE:.0e} for losses"
    screen.print(Text(f"{verdict} (within {within}).", style="bold red" if bad else "green"))
    for outcome in bad[:MOST_NAMED]:
        found = outcome.failure or f"gradients {outcome.gradients:.1e}, weights {outcome.weights:.1e}, worst at "
        screen.print(f"  {outcome.cell}: {found}{outcome.worst}", soft_wrap=True)
    return not bad


def _error(error: float, tolerance: float, *, failed: bool) -> Text:
    is_good = error <= tolerance and not failed
    return Text("stopped" if failed else f"{error:.1e}", style="" if is_good else "bold red")


def doctor(
    *,
    strategies: Annotated[
        bool,
        typer.Option(
            "--strategies", help="Compare every ZeRO stage and backward order with plain torch, on CPU ranks."
        ),
    ] = False,
    cells: Annotated[Path | None, typer.Option(hidden=True)] = None,
    results: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Say what this machine has to train with, or with --strategies whether it trains right."""
    if not strategies:
        if cells or results:
            raise typer.BadParameter("goes with --strategies only", param_hint="--cells" if cells else "--results")
        print_machine()
        return
    if cells is not None and results is not None:  # this process is one of the ranks that the line below starts
        compare_as_rank(cells, results)
        return
    from mtp_lightning.diagnostics.parity import compare_strategies
    from mtp_lightning.diagnostics.parity_matrix import sample

    if not print_outcomes(compare_strategies(sample())):
        raise typer.Exit(1)
