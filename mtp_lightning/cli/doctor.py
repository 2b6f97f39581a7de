"""`mtp doctor`: the machine and its packages, every strategy against plain torch, and what a GPU does."""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from mtp_lightning.cli.targets import JsonOption
from mtp_lightning.console.tables import build_table, console, number, scaled, write_json

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


def examine_gpu(json_path: Path | None) -> bool:
    """Measure the GPU part by part, print a line of figures for each, write all of them; tell whether all is well."""
    from mtp_lightning.bench.gpu import PARTS, examine

    report = examine(lambda name: print(f"measuring: {name}", file=sys.stderr, flush=True))
    write_json(json_path, {"benchmark": "gpu", **report})
    screen = console()
    for name in PARTS:
        found = report[name]
        lines: Sequence[str | Text] = LINES[name](found) if "failure" not in found else [_red(found["failure"])]
        for index, line in enumerate(lines):
            screen.print(Text.assemble(("" if index else name).ljust(LABEL), line), soft_wrap=True)
    return not any("failure" in found or found.get("not_equal") for found in report.values())


def _red(text: str) -> Text:
    return Text(text, style="bold red")


def _device_lines(found: dict[str, Any]) -> list[str]:
    sheet = found.get("data_sheet_bf16_flops_per_s")
    of_sheet = f" of {scaled(sheet)}FLOP/s on its data sheet" if sheet else ""
    return [
        f"{found.get('gpus', 1)} x {found['name']}, torch {found['torch']}, CUDA {found['cuda']}",
        f"products in bf16 {scaled(found['bf16_flops_per_s'])}FLOP/s{of_sheet}, "
        f"copies {scaled(found['copied_bytes_per_s'])}B/s, "
        f"a launch {1e6 * found['launch_s']:.1f} us, a wait {1e6 * found['wait_s']:.1f} us",
    ]


def _strategies_lines(found: dict[str, Any]) -> list[str]:
    equal = found["cells"] - len(found["not_equal"])
    first = f"{equal} of {found['cells']} cells equal to plain torch, worst error {number(found['worst_error'], '.1e')}"
    return [first, *(f"not equal: {line}" for line in found["not_equal"][:MOST_NAMED])]


def _training_lines(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{found['shape']}, n={row['num_offsets']}: {row['step_s']:.3g} s a step (planned "
        f"{number(row['planned_step_s'], '.3g')}), {row['tokens_per_s']:,.0f} tokens/s, "
        f"MFU {number(row['mfu'], '.0%')}, peak {number(row['peak_bytes'] and row['peak_bytes'] / 2**30, '.1f')} GiB "
        f"(planned {row['planned_peak_bytes'] / 2**30:.1f})"
        for row in found["figures"]
    ]
    return [*lines, f"{found['launches']:,} launches and {found['host_waits']} waits of the host in a step"]


def _decoding_lines(found: dict[str, Any]) -> list[str]:
    return [
        f"{way['decoder']} {way['draft_length'] or ''}{' (all accepted)' if way['all_accepted'] else ''}: "
        f"{way['tokens_per_s']:,.1f} tokens/s"
        for way in found["ways"]
    ]


def _compiled_lines(found: dict[str, Any]) -> list[str]:
    return [
        f"{way['decoder']} {way['draft_length'] or ''}{' compiled' if way['compiled'] else ' eager'}: "
        f"{way['tokens_per_s']:,.1f} tokens/s, the first text in {way['first_s']:.1f} s"
        f"{'' if way['same_text'] else '; another text than eager steps: a near tie, or an error'}"
        for way in found["ways"]
    ]


LINES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "device": _device_lines,
    "strategies": _strategies_lines,
    "training": _training_lines,
    "decoding": _decoding_lines,
    "compiled": _compiled_lines,
}


def doctor(
    *,
    strategies: Annotated[
        bool,
        typer.Option(
            "--strategies", help="Compare every ZeRO stage and backward order with plain torch, on CPU ranks."
        ),
    ] = False,
    gpu: Annotated[
        bool,
        typer.Option("--gpu", help="Measure the GPU in minutes: strategies, training, decoding."),
    ] = False,
    json: JsonOption = None,
    cells: Annotated[Path | None, typer.Option(hidden=True)] = None,
    results: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Say what this machine has to train with, with --strategies whether it trains right, with --gpu how fast."""
    if json and not gpu:
        raise typer.BadParameter("goes with --gpu only", param_hint="--json")
    if gpu:
        if strategies:
            raise typer.BadParameter("compares strategies already", param_hint="--gpu")
        if not examine_gpu(json):
            raise typer.Exit(1)
        return
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
