"""Step times of several recipes in one process: interleaved rounds, so that all see the same weather.

A busy or throttled machine changes its speed over minutes. Every round measures each cell once, every other round in
reverse order; ratios are taken within a round and only then their median.
"""

import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mtp_lightning.bench.cells import Cell
from mtp_lightning.bench.showing import watched
from mtp_lightning.bench.step import TrainingStep
from mtp_lightning.errors import TrainingError
from mtp_lightning.planner.counts import parameter_counts

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
    """Measure all cells in interleaved rounds.

    Cells of one number of offsets share a model. On the CPU the models of all numbers of offsets stay in memory; on
    CUDA they wait on the host, and the one whose turn it is has the device to itself.
    """
    groups: dict[int, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.num_offsets].append(cell)
    _check_memory([group[0] for group in groups.values()])
    timings = Timings()
    with watched(num_rounds * len(cells)) as report:
        report("building models", done=0)
        steps = {num_offsets: TrainingStep(group[0].recipe, device) for num_offsets, group in groups.items()}
        for number in range(num_rounds):
            _sample_product(timings, device, cells[0].recipe.run.precision)
            order = list(groups.items())[:: -1 if number % 2 else 1]
            for num_offsets, group in order:
                report(f"n={num_offsets}, round {number + 1} of {num_rounds}", done=_num_samples(timings))
                _take_turn(steps[num_offsets], group[:: -1 if number % 2 else 1], timings)
    return timings


def _num_samples(timings: Timings) -> int:
    return sum(len(samples) for samples in timings.step_s.values())


def _take_turn(step: TrainingStep, group: list[Cell], timings: Timings) -> None:
    """Measure every schedule of one model once; first visits, and all on CUDA, begin with a step that is not timed."""
    is_parked = step.device.type == "cuda"
    step.to(step.device)
    for cell in group:
        if is_parked or not timings.step_s[cell.key]:
            step.run(cell.schedule, predicts=False)
        _sample_step(step, cell, timings)
    if is_parked:
        step.to(torch.device("cpu"))
        torch.cuda.empty_cache()


def _sample_step(step: TrainingStep, cell: Cell, timings: Timings) -> None:
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(step.device)
    timings.step_s[cell.key].append(step_seconds(step, cell.schedule))
    if step.device.type == "cuda":
        timings.peak_bytes[cell.key] = torch.cuda.max_memory_allocated(step.device)


def step_seconds(step: TrainingStep, schedule: str) -> float:
    """Time of one optimizer step, over as many as fill `SAMPLE_S`."""
    _synchronize(step.device)
    began_at = time.perf_counter()
    num_steps, elapsed_s = 0, 0.0
    while elapsed_s < SAMPLE_S:
        step.run(schedule, predicts=False)
        _synchronize(step.device)
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


def _check_memory(cells: list[Cell]) -> None:
    """Refuse to start what cannot fit: the models of all numbers of offsets stay on the host."""
    needed_bytes = KEPT_BYTES * sum(parameter_counts(cell.recipe).total for cell in cells)
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
