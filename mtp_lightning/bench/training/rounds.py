"""Step times of several recipes in one process: interleaved rounds, so that all see the same weather.

A busy or throttled machine changes its speed over minutes. Every round measures each cell once, every other round in
reverse order; ratios are taken within a round and only then their median.
"""

import math
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mtp_lightning.bench.training.cells import Cell
from mtp_lightning.bench.training.step import TrainingStep
from mtp_lightning.console.tables import watched
from mtp_lightning.errors import TrainingError
from mtp_lightning.planner.counts import parameter_counts
from mtp_lightning.recipe.schema.root import Recipe

SAMPLE_S = 0.5  # a sample is one step, or as many as fill this time
PRODUCT_WIDTH = 2048  # of the matrix product that a CPU is measured by
PRODUCT_REPEATS = 3
KEPT_BYTES = 12  # per parameter of a model that waits for its turn: weight and two moments of AdamW, fp32

Key = tuple[int, str]


@dataclass
class Timings:
    """Samples of every cell, a number per round."""

    step_s: dict[Key, list[float]] = field(default_factory=lambda: defaultdict(list))
    peak_bytes: dict[Key, int] = field(default_factory=dict)  # CUDA only
    product_flops_per_s: list[float] = field(default_factory=list)  # CPU only


def time_rounds(cells: list[Cell], device: torch.device, num_rounds: int) -> Timings:
    """Measure all cells in interleaved rounds."""
    timings = Timings()
    with watched(num_rounds * len(cells)) as report:
        report("building models", done=0)
        stage = Stage(cells, device)
        for number in range(num_rounds):
            _sample_product(timings, device, cells[0].recipe.run.precision)
            for index, cell in enumerate(_order(cells, device)[:: -1 if number % 2 else 1]):
                doing = f"n={cell.num_offsets} {cell.backward_order}, round {number + 1} of {num_rounds}"
                report(doing, done=number * len(cells) + index)
                _sample_step(stage.ready(cell), cell, timings)
    return timings


def _order(cells: list[Cell], device: torch.device) -> list[Cell]:
    """Put next to each other what is compared: the cells of a backward order; on CUDA those that share a model."""
    backward_orders = list(dict.fromkeys(cell.backward_order for cell in cells))
    return (
        cells if device.type == "cuda" else sorted(cells, key=lambda cell: backward_orders.index(cell.backward_order))
    )


class Stage:
    """The models of all numbers of offsets, shared by their backward orders.

    On the CPU all stay in memory. On CUDA they wait on the host, and the one whose turn it is has the device to itself.
    """

    def __init__(self, cells: list[Cell], device: torch.device) -> None:
        recipes = {cell.num_offsets: cell.recipe for cell in cells}
        _check_memory(list(recipes.values()))
        self.device, self.host = device, torch.device("cpu")
        self.steps: dict[int, TrainingStep] = {}
        for num_offsets, recipe in recipes.items():
            self.steps[num_offsets] = TrainingStep(recipe, device)
            if device != self.host:
                self.steps[num_offsets].to(self.host)
        self.warm: set[Key] = set()
        self.on_device: int | None = None

    def ready(self, cell: Cell) -> TrainingStep:
        """Return the cell's model on the device, after one step that is not timed if it is cold."""
        step = self.steps[cell.num_offsets]
        if self.device != self.host and self.on_device != cell.num_offsets:
            self._swap_in(cell.num_offsets)
        if cell.key not in self.warm:
            step.run(cell.backward_order, predicts=False)
            self.warm.add(cell.key)
        return step

    def _swap_in(self, num_offsets: int) -> None:
        if self.on_device is not None:
            self.steps[self.on_device].to(self.host)
        torch.cuda.empty_cache()
        self.steps[num_offsets].to(self.device)
        self.on_device = num_offsets
        self.warm.clear()


def _sample_step(step: TrainingStep, cell: Cell, timings: Timings) -> None:
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(step.device)
    timings.step_s[cell.key].append(step_seconds(step, cell.backward_order))
    if step.device.type == "cuda":
        timings.peak_bytes[cell.key] = torch.cuda.max_memory_allocated(step.device)


def step_seconds(step: TrainingStep, backward_order: str) -> float:
    """Time of one optimizer step in a backward order."""
    return seconds_of(lambda: step.run(backward_order, predicts=False), step.device)


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    """Time of one call, over as many as fill `SAMPLE_S`."""
    _synchronize(device)
    began_at = time.perf_counter()
    num_steps, elapsed_s = 0, 0.0
    while elapsed_s < SAMPLE_S:
        step()
        _synchronize(device)
        num_steps, elapsed_s = num_steps + 1, time.perf_counter() - began_at
    return elapsed_s / num_steps


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _sample_product(timings: Timings, device: torch.device, precision: str) -> None:
    """Measure how fast the CPU multiplies plain matrices: what stands in for its peak."""
    if device.type == "cuda":
        return
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left = torch.ones(PRODUCT_WIDTH, PRODUCT_WIDTH, dtype=dtype)
    best_s = math.inf
    for _ in range(1 + PRODUCT_REPEATS):
        began_at = time.perf_counter()
        left @ left
        best_s = min(best_s, time.perf_counter() - began_at)
    timings.product_flops_per_s.append(2 * PRODUCT_WIDTH**3 / best_s)


def _check_memory(recipes: list[Recipe]) -> None:
    """Refuse to start what cannot fit: the models of all numbers of offsets stay on the host."""
    needed_bytes = KEPT_BYTES * sum(parameter_counts(recipe).total for recipe in recipes)
    free_bytes = _available_bytes()
    if needed_bytes > free_bytes:
        raise TrainingError(
            "the models of all numbers of offsets must fit into memory together",
            f"{needed_bytes / 2**30:.1f} GiB of weights and optimizer state, and {free_bytes / 2**30:.1f} GiB free",
            "Measure fewer at a time: --offsets 1,4",
        )


def _available_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return 1024 * int(fields["MemAvailable"].split()[0])
