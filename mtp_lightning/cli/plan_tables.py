"""What would change a plan: tables of other checkpointing, other strategies, other numbers of GPUs."""

from collections.abc import Callable, Sequence

from rich.table import Table

from mtp_lightning.console.tables import BLANK, build_table
from mtp_lightning.planner.memory import GIB
from mtp_lightning.planner.report import Plan, Variant

Cell = Callable[[Variant], str]
Columns = dict[str, Cell]
TableBuilder = Callable[[Plan, int], Table]

GIGA = 1e9
WIDE = 98  # columns of the widest table


def what_if(plan: Plan, width: int) -> list[tuple[str, Table]]:
    """Build the tables for a screen of some width, each with a title."""
    recomputed = ["nothing", "heads", "trunk", "trunk and heads"]
    kinds = [_strategy_name(variant) for variant in plan.strategies]
    at_scale = [variant for variant in plan.scales if variant]
    gpus = [f"{variant.layout.num_gpus:,}" for variant in at_scale]
    checkpointing = "With other checkpointing (memory.recompute_trunk, recompute_heads)"
    strategy = "With another strategy (strategy.kind, offload_optimizer, offload_parameters)"
    scale = f"On more or fewer GPUs, the same {plan.recipe.batch.global_batch_size:,} rows per step"
    tables = [
        (checkpointing, _table("recomputed", recomputed, plan.checkpointing, CHECKPOINTING)),
        (strategy, _table("strategy", kinds, plan.strategies, STRATEGIES)),
        (scale, _table("GPUs", gpus, at_scale, SCALE)),
    ]
    return [(title, table(plan, width)) for title, table in tables if table]


def _table(first: str, names: list[str], variants: Sequence[Variant], columns: Columns) -> TableBuilder | None:
    """Prepare a table with a row per way of running; on a narrow screen it does without some columns."""

    def build(plan: Plan, width: int) -> Table:
        is_narrow = width < WIDE
        shown = {title: cell for title, cell in columns.items() if not (is_narrow and cell in DISPENSABLE)}
        table = build_table([first, *shown], left=-1 if first == "GPUs" else 0, gap=1 if is_narrow else 2)
        for name, variant in zip(names, variants, strict=True):
            table.add_row(name, *(cell(variant) for cell in shown.values()), style=_style(variant, plan))
        return table

    return build if variants else None


def _strategy_name(variant: Variant) -> str:
    """Name a strategy with what it offloads, o for the optimizer and w for weights."""
    layout = variant.layout
    moved = {"o": layout.offload_optimizer, "w": layout.offload_parameters}
    places = {place: "+".join(name for name in moved if moved[name] == place) for place in ("cpu", "nvme")}
    return " ".join([variant.kind, *(f"{names}>{place}" for place, names in places.items() if names)])


def _largest(variant: Variant) -> str:
    return f"{variant.most_micro_rows:,}" if variant.most_micro_rows else BLANK


def _micro_batches(variant: Variant) -> str:
    return f"{variant.layout.num_micro_batches:,} x {variant.layout.micro_batch_size}"


def _sent(name: str) -> Cell:
    return lambda variant: f"{variant.communication_bytes[name] / GIGA:,.1f}"


def _style(variant: Variant, plan: Plan) -> str:
    """Set the recipe's own way apart, and what does not fit."""
    if variant.layout == plan.chosen.layout:
        return "bold"
    return "" if variant.fits else "dim"


def gib(number_bytes: float) -> str:
    """Format bytes as GiB.

    >>> gib(3 * GIB)
    '3.00'
    """
    value = number_bytes / GIB
    if value < 0.001:
        return "<0.001"
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _gib_or_blank(number_bytes: float) -> str:
    return gib(number_bytes) if number_bytes else BLANK


def seconds(value: float) -> str:
    """Format seconds with three digits.

    >>> seconds(245.1), seconds(13.0), seconds(0.00145)
    ('245', '13.0', '0.00145')
    """
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def duration(days: float) -> str:
    """Format a time in the unit that suits it.

    >>> duration(0.5), duration(30), duration(1 / 1440), duration(1e-5)
    ('12.0 hours', '30.0 days', '1.0 minutes', '0.9 seconds')
    """
    for unit, length in {"days": 1.0, "hours": 1 / 24, "minutes": 1 / 1440}.items():
        if days >= length:
            return f"{days / length:,.1f} {unit}"
    return f"{days * 86_400:,.1f} seconds"


def hours(value: float) -> str:
    """Format hours of GPU time."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def short(count: float) -> str:
    """Format a large number with three digits.

    >>> short(13_015_864_320), short(257)
    ('13.0 B', '257')
    """
    for name, size in {" T": 1e12, " B": 1e9, " M": 1e6, " k": 1e3}.items():
        if count >= size:
            return f"{count / size:#.3g}".rstrip(".") + name
    return f"{count:.0f}"


TOTAL: Columns = {"total\nGiB": lambda variant: gib(variant.memory.total)}
FITS: Columns = {"fits": lambda variant: "yes" if variant.fits else "no", "largest\nmicro-batch": _largest}
SPEED: Columns = {
    "s/step": lambda variant: seconds(variant.time.total_s),
    "MFU": lambda variant: f"{variant.mfu:.1%}",
}
CHECKPOINTING: Columns = {
    "trunk\nGiB": lambda variant: _gib_or_blank(variant.memory.trunk_activations),
    "heads\nGiB": lambda variant: gib(variant.memory.head_activations),
    **TOTAL,
    **FITS,
    **SPEED,
}
STRATEGIES: Columns = {
    "state\nGiB": lambda variant: gib(variant.memory.state),
    **TOTAL,
    "on host\nGiB": lambda variant: _gib_or_blank(variant.memory.offloaded),
    **FITS,
    "gather\nGB/step": _sent("gather_weights"),
    "reduce\nGB/step": _sent("reduce_gradients"),
    **SPEED,
}
SCALE: Columns = {
    "micro-\nbatches": _micro_batches,
    **TOTAL,
    **FITS,
    **SPEED,
    "tokens/s\nper GPU": lambda variant: f"{variant.tokens_per_s:,.0f}",
    "whole run": lambda variant: duration(variant.days),
    "GPU-hours": lambda variant: hours(variant.gpu_hours),
}
DISPENSABLE = (_largest,)
