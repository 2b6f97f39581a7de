"""Step time of training for several numbers of offsets and backward orders: `mtp bench train`.

Real optimizer steps on random tokens, all cells in one process and in interleaved rounds (`rounds.py`), beside the
operations that the planner counts. With matched parameters, n offsets need the operations of one and n - 1 products
with the V x D matrix more: the FLOP ratio is the least that they can cost, and `time / FLOP` what is lost on top.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles

from rich.table import Table

from mtp_lightning.bench.machine import Machine, describe_machine
from mtp_lightning.bench.training.cells import Cell, build_cells, describe_matching, describe_shape, impossible
from mtp_lightning.bench.training.rounds import PRODUCT_WIDTH, Key, Timings, time_rounds
from mtp_lightning.console.tables import add_rows, build_table, console, number, ratio, scaled, write_json
from mtp_lightning.planner.flops import flop_ratio, flops_per_step, tokens_per_step
from mtp_lightning.planner.hardware import peak_flops_per_s
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.strategies.deterministic import deterministic_kernels
from mtp_lightning.training.strategies.device import prepare_device

ROUNDS = 5
BUSY_LOAD = 0.3
GIB = 2**30


@dataclass(frozen=True)
class SpeedFigure:
    """What one cell took."""

    num_offsets: int
    backward_order: str
    layers: str
    step_s: float  # median over the rounds
    samples_s: list[float]  # one per round
    tokens_per_s: float
    flops_per_step: int
    peak_share: float | None  # of the device's peak (MFU), or of a plain matrix product on a CPU
    flop_ratio: float  # to n=1
    time_ratio: float | None  # to n=1 under the same backward order
    time_over_flops: float | None
    ratio_to_joint: float | None  # same number of offsets
    peak_bytes: int | None  # CUDA only


def bench_train(
    recipe: Recipe, *, offsets: list[int], backward_orders: list[str], json_path: Path | None, rounds: int = ROUNDS
) -> None:
    """Measure every cell, print a table with ratios, and write the figures as JSON where a path is given."""
    with deterministic_kernels(recipe):
        device = prepare_device(recipe)
        machine = describe_machine(device)
        cells = build_cells(recipe, offsets, backward_orders)
        possible = [cell for cell in cells if cell.obstacle is None]
        timings = time_rounds(possible, device, rounds) if possible else Timings()
        peak = _peak_flops_per_s(machine, timings, recipe.run.precision)
    figures = [speed_figure(cell, timings, peak) for cell in possible]
    screen = console()
    screen.print(f"Speed of a training step: {recipe.name}", style="bold")
    screen.print(describe_shape(recipe), describe_matching(recipe), sep="\n", end="\n\n")
    screen.print(speed_table(figures, on_cuda=device.type == "cuda"), "", sep="\n")
    for remark in [*impossible(cells), *_table_notes(recipe, machine, figures, peak)]:
        screen.print(remark)
    write_json(
        json_path,
        {
            "benchmark": "train",
            "recipe": recipe.model_dump(mode="json"),
            "machine": asdict(machine),
            "rounds": rounds,
            "peak_flops_per_s": peak,
            "peak_is": "measured matrix product" if device.type == "cpu" else "data sheet",
            "figures": [asdict(figure) for figure in figures],
        },
    )


def _peak_flops_per_s(machine: Machine, timings: Timings, precision: str) -> float | None:
    if machine.device == "cpu":
        return max(timings.product_flops_per_s, default=None)
    return peak_flops_per_s(machine.name, precision)


def speed_figure(cell: Cell, timings: Timings, peak: float | None) -> SpeedFigure:
    """Put one cell's time, operations and ratios together."""
    samples, flops = timings.step_s[cell.key], flops_per_step(cell.recipe)
    step_s, by_flops = median(samples), flop_ratio(cell.recipe, cell.num_offsets)
    time_ratio = _paired_ratio(timings, cell.key, (1, cell.backward_order))
    return SpeedFigure(
        *cell.key,
        layers=cell.layers,
        step_s=step_s,
        samples_s=samples,
        tokens_per_s=tokens_per_step(cell.recipe) / step_s,
        flops_per_step=flops,
        peak_share=ratio(flops / step_s, peak),
        flop_ratio=by_flops,
        time_ratio=time_ratio,
        time_over_flops=ratio(time_ratio, by_flops),
        ratio_to_joint=_paired_ratio(timings, cell.key, (cell.num_offsets, "joint")),
        peak_bytes=timings.peak_bytes.get(cell.key),
    )


def _paired_ratio(timings: Timings, key: Key, base: Key) -> float | None:
    """Median over the rounds of the ratio within a round."""
    if base not in timings.step_s:
        return None
    pairs = zip(timings.step_s[key], timings.step_s[base], strict=True)
    return median(sample / base_sample for sample, base_sample in pairs)


def spread(samples: list[float]) -> float:
    """Distance between the quartiles, as a share of the median.

    >>> spread([1.0, 2.0, 2.0, 2.0, 9.0])
    0.0
    """
    if len(samples) < 2:
        return 0.0
    lower, middle, upper = quantiles(samples, n=4, method="inclusive")
    return (upper - lower) / middle


def speed_table(figures: list[SpeedFigure], *, on_cuda: bool) -> Table:
    """Lay the figures out, a section per number of offsets; fits 80 columns."""
    columns = ["\nn", "backward\norder", "step\ns", "tokens\n/ s", "FLOP\n/ step", "MFU\n%" if on_cuda else "matmul\n%"]
    columns += ["FLOP\n/ n=1", "time\n/ n=1", "time\n/ FLOP", "time\n/ joint"]
    rows = [_row(figure) for figure in figures]
    if on_cuda:
        columns.append("peak\nGiB")
        for row, figure in zip(rows, figures, strict=True):
            row.append(number(figure.peak_bytes and figure.peak_bytes / GIB, ".1f"))
    table = build_table(columns, left=1, gap=1)
    add_rows(table, rows)
    return table


def _row(figure: SpeedFigure) -> list[str]:
    return [
        str(figure.num_offsets),
        figure.backward_order,
        number(figure.step_s, ".3g"),
        number(figure.tokens_per_s, ",.0f"),
        scaled(figure.flops_per_step),
        number(figure.peak_share and 100 * figure.peak_share, ".0f"),
        number(figure.flop_ratio, ".3f"),
        number(figure.time_ratio, ".3f"),
        number(figure.time_over_flops, ".3f"),
        number(figure.ratio_to_joint, ".3f"),
    ]


def _table_notes(recipe: Recipe, machine: Machine, figures: list[SpeedFigure], peak: float | None) -> list[str]:
    if not figures:
        return []
    widest = max(spread(figure.samples_s) for figure in figures)
    return [
        f"step: median of {len(figures[0].samples_s)} interleaved rounds, whose middle half spreads over {widest:.0%} "
        "at most. time / n=1: to the same backward order with one offset, taken within each round.",
        "FLOP: forward and backward, all heads, one V x D product per offset, attention over all T positions; "
        "nothing computed twice counts. time / FLOP: time / n=1 over FLOP / n=1.",
        _peak_remark(machine, peak, recipe.run.precision),
        f"Measured on {machine}.",
        *_recompute_remark(recipe),
        *_load_remark(machine),
    ]


def _recompute_remark(recipe: Recipe) -> list[str]:
    is_recomputed = {"trunk": recipe.memory.recompute_trunk, "heads": recipe.recomputes_heads}
    parts = [name for name, is_on in is_recomputed.items() if is_on]
    if not parts:
        return []
    return [f"Activations of the {' and the '.join(parts)} are computed twice; that shows in time / FLOP."]


def _load_remark(machine: Machine) -> list[str]:
    if machine.device == "cuda" or machine.load < BUSY_LOAD:
        return []
    return [f"Others kept {machine.load:.0%} of the cores busy when this began: expect noise, most of all in 'step'."]


def _peak_remark(machine: Machine, peak: float | None, precision: str) -> str:
    if peak is None:
        return f"MFU: the planner's hardware.yaml has no entry for {machine.name}."
    rate = f"{scaled(peak)}FLOP/s in {precision}"
    if machine.device == "cuda":
        return f"MFU %: share of the data sheet's {rate}."
    return f"matmul %: share of what a {PRODUCT_WIDTH:,}-wide matrix product reached in the same run, {rate}."
