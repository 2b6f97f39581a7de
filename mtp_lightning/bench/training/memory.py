"""Peak memory of a training step for several numbers of offsets and backward orders: `mtp bench memory`.

Each figure comes from a fresh process (`probe.py`): a warm-up step that allocates gradients and optimizer state, then
the peak during a second, real step, above what the process held before the model was built. On CUDA the figure is
what torch's allocator says; on the CPU it is peak resident memory, with an allocator told to return freed memory at
once (`peak.py`). Weights, gradients and AdamW's state are part of the peak and shown beside it.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mtp_lightning.bench.training.cells import Cell, build_cells, describe_matching, describe_shape, impossible
from mtp_lightning.bench.training.peak_memory import MALLOC_ENVIRONMENT
from mtp_lightning.console.tables import add_rows, build_table, console, number, ratio, watched, write_json
from mtp_lightning.launch.local import run_to_end
from mtp_lightning.planner.counts import parameter_counts, trainable_parameters
from mtp_lightning.recipe.schema.root import Recipe

MIB = 2**20
WEIGHT_BYTES = 4  # per parameter, fp32
TRAINED_BYTES = 12  # per parameter that is trained: fp32 gradient and two moments of AdamW
METHOD = {
    "cpu": "peak resident memory of a second training step, in a process of its own per row, above what that process "
    "held before the model was built",
    "cuda": "peak of torch's allocator during a second training step, in a process of its own per row",
}


@dataclass(frozen=True)
class MemoryFigure:
    """What one cell took."""

    num_offsets: int
    backward_order: str
    layers: str
    state_bytes: int  # weights, gradients and optimizer state
    peak_bytes: int | None
    ratio_to_one_offset: float | None  # same backward order
    ratio_to_joint: float | None  # same number of offsets
    failure: str | None


def bench_memory(recipe: Recipe, *, offsets: list[int], backward_orders: list[str], json_path: Path | None) -> None:
    """Measure every cell, print a table with ratios, and write the figures as JSON where a path is given."""
    cells = build_cells(recipe, offsets, backward_orders)
    results = measure_peaks(cells)
    figures = memory_figures(cells, results)
    machine = next((result["machine"] for result in results.values() if "machine" in result), None)
    screen = console()
    screen.print(f"Peak memory of a training step: {recipe.name}", style="bold")
    screen.print(describe_shape(recipe), describe_matching(recipe), sep="\n", end="\n\n")
    screen.print(memory_table(figures), "", sep="\n")
    for remark in _table_notes(cells, figures, machine):
        screen.print(remark)
    write_json(
        json_path,
        {
            "benchmark": "memory",
            "recipe": recipe.model_dump(mode="json"),
            "machine": machine,
            "method": machine and METHOD[machine["device"]],
            "figures": [asdict(figure) for figure in figures],
        },
    )


def measure_peaks(cells: list[Cell]) -> dict[tuple[int, str], dict[str, Any]]:
    """Run the probe of every cell that can run, one after the other; a result is figures or a `failure`."""
    todo = [cell for cell in cells if cell.obstacle is None]
    results = {}
    with watched(len(todo)) as report:
        for done, cell in enumerate(todo):
            report(f"n={cell.num_offsets} {cell.backward_order}", done=done)
            results[cell.key] = run_probe(cell.recipe)
    return results


def run_probe(recipe: Recipe) -> dict[str, Any]:
    """Measure one recipe in a fresh process."""
    process = run_to_end(
        [sys.executable, "-m", "mtp_lightning.bench.training.memory_probe"],
        input=recipe.model_dump_json(),
        env={**os.environ, **MALLOC_ENVIRONMENT},
    )
    if process.returncode == 0:
        result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
        return result
    if process.returncode < 0:
        return {"failure": f"killed by signal {-process.returncode}; out of memory is the usual reason"}
    return {"failure": (process.stderr.strip().splitlines() or ["no message"])[-1]}


def memory_figures(cells: list[Cell], results: dict[tuple[int, str], dict[str, Any]]) -> list[MemoryFigure]:
    """Put results and ratios together, a figure per cell."""
    peaks = {key: result.get("peak_bytes") for key, result in results.items()}
    return [
        MemoryFigure(
            *cell.key,
            layers=cell.layers,
            state_bytes=WEIGHT_BYTES * parameter_counts(cell.recipe).total
            + TRAINED_BYTES * trainable_parameters(cell.recipe),
            peak_bytes=peaks.get(cell.key),
            ratio_to_one_offset=ratio(peaks.get(cell.key), peaks.get((1, cell.backward_order))),
            ratio_to_joint=ratio(peaks.get(cell.key), peaks.get((cell.num_offsets, "joint"))),
            failure=results.get(cell.key, {}).get("failure"),
        )
        for cell in cells
        if cell.obstacle is None
    ]


def memory_table(figures: list[MemoryFigure]) -> Table:
    """Lay the figures out, a section per number of offsets; fits 80 columns."""
    columns = ["\nn", "backward\norder", "layers\ntrunk + heads"]
    columns += ["peak\nMiB", "of it state\nMiB", "peak\n/ n=1", "peak\n/ joint"]
    table = build_table(columns, left=1, gap=2)
    add_rows(table, [_row(figure) for figure in figures])
    return table


def _row(figure: MemoryFigure) -> list[str]:
    return [
        str(figure.num_offsets),
        figure.backward_order,
        figure.layers,
        number(figure.peak_bytes and figure.peak_bytes / MIB, ",.0f"),
        number(figure.state_bytes / MIB, ",.0f"),
        number(figure.ratio_to_one_offset, ".2f"),
        number(figure.ratio_to_joint, ".2f"),
    ]


def _table_notes(cells: list[Cell], figures: list[MemoryFigure], machine: dict[str, Any] | None) -> list[str]:
    table_notes = impossible(cells)
    table_notes += [f"n={f.num_offsets} {f.backward_order} failed: {f.failure}" for f in figures if f.failure]
    if machine is not None:
        table_notes += [
            f"Method: {METHOD[machine['device']]}.",
            "State: fp32 weights, gradients and AdamW's two moments. / n=1: to the same order with one offset.",
            f"Measured on {machine['name']} (torch {machine['torch']}).",
        ]
    return table_notes
