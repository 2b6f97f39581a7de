"""A plan on the screen: what a run needs, what takes the time, and what would change it."""

from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from mtp_lightning.bench.showing import BLANK, build_table, console, write_json
from mtp_lightning.planner.memory import GIB, Memory
from mtp_lightning.planner.report import SCALES, Plan, Variant
from mtp_lightning.planner.throughput import StepTime
from mtp_lightning.recipe.words import one_of

GIGA = 1e9
LABEL = 13
COMPONENTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer: master, two moments",
    "trunk_activations": "trunk activations",
    "head_activations": "head activations",
    "logits": "logits",
    "unembedding_gradient": "unembedding gradient",
    "gathered_weights": "gathered weights",
    "reduction_buckets": "reduction buckets",
    "overhead": "CUDA, NCCL, fragmentation",
}
PARTS = {
    "products_s": "matrix products",
    "attention_s": "attention",
    "memory_bound_s": "norms, activations, loss",
    "launch_s": "waiting for kernel launches",
    "communication_s": "communication not hidden",
    "update_s": "optimizer update",
}


def write_plan(plan: Plan, path: Path) -> None:
    """Write the figures to a file."""
    write_json(path, plan.as_json())


def print_plan(plan: Plan) -> None:
    """Print a plan: the run, memory and time side by side where they fit, and three tables of what would change it."""
    screen = console()
    screen.print(_title(plan), "", _run_lines(plan), "", sep="\n")
    screen.print(_side_by_side(_memory_table(plan), _time_table(plan.chosen.time), screen))
    screen.print(_verdict(plan), "", sep="\n")
    for title, table in _what_if(plan):
        screen.print(Text(title, style="bold"), table, "", sep="\n")
    for remark in _remarks(plan):
        screen.print(remark, style="dim")


def _title(plan: Plan) -> Text:
    layout, name = plan.chosen.layout, plan.hardware.name
    nodes = f" ({layout.num_nodes} nodes of {layout.gpus_per_node})" if layout.num_nodes > 1 else ""
    where = f"{layout.num_gpus} x {name}{nodes}, {plan.chosen.kind}, {layout.precision}"
    return Text.assemble((plan.recipe.name, "bold"), "  on  ", (where, "bold cyan"))


def _run_lines(plan: Plan) -> Text:
    """Say what the run is: model, step, cost."""
    chosen = plan.chosen
    lines = {
        "parameters": _parameters(plan),
        "step": _step(plan),
        "run": f"{plan.recipe.run.steps:,} steps, {_short(plan.total_tokens)} tokens, {plan.total_flops:.2e} FLOPs",
        "speed": f"{seconds(chosen.time.total_s)} s per step, {chosen.tokens_per_s:,.0f} tokens/s per GPU, "
        f"MFU {chosen.mfu:.1%}",
        "cost": f"{duration(chosen.days)}, {_hours(chosen.gpu_hours)} GPU-hours",
    }
    return Text("\n").join(Text.assemble((label.ljust(LABEL), "cyan"), text) for label, text in lines.items())


def cost_line(plan: Plan) -> str:
    """Say in one line what a run costs: the line that recipes carry in their headers."""
    chosen = plan.chosen
    return (
        f"{_short(plan.total_tokens)} tokens on {chosen.layout.num_gpus} x {plan.hardware.name}: "
        f"{_hours(chosen.gpu_hours)} GPU-hours, {duration(chosen.days)} (predicted by `mtp plan`)."
    )


def _parameters(plan: Plan) -> str:
    counts = plan.shape.parameters
    return (
        f"{_short(counts.total)} ({counts.total:,}): trunk {_short(counts.trunk)}, heads {_short(counts.heads)}, "
        f"unembedding {_short(counts.unembedding)}"
    )


def _step(plan: Plan) -> str:
    layout = plan.chosen.layout
    share = f"{layout.num_micro_batches} x {layout.micro_rows} per GPU" if layout.num_micro_batches > 1 else "at once"
    rows = f"{plan.recipe.batch.rows:,} rows of {plan.shape.window_tokens:,} tokens ({share})"
    return f"{rows} = {plan.tokens_per_step:,} tokens, {plan.flops_per_step:.2e} FLOPs"


def _memory_table(plan: Plan) -> Table:
    table = build_table(["memory per GPU", "GiB"], left=0, gap=2)
    needed = plan.chosen.memory
    for name, label in COMPONENTS.items():
        if getattr(needed, name) > 0:
            table.add_row(_component_label(name, plan) or label, gib(getattr(needed, name)))
    table.add_section()
    table.add_row("total", Text(gib(needed.total), style="bold"))
    if needed.offloaded:
        table.add_row("besides, offloaded", gib(needed.offloaded))
    return table


def _component_label(name: str, plan: Plan) -> str | None:
    """Name a component more exactly, where the recipe decides what it is."""
    layout = plan.chosen.layout
    return {
        "optimizer": None if layout.stage else "optimizer: two moments",
        "logits": "logits of all offsets" if layout.schedule == "joint" else "logits, one chunk",
        "gathered_weights": None if layout.stage else "weights cast to bf16",
    }.get(name)


def _time_table(time: StepTime) -> Table:
    table = build_table(["time per step", "s", "share"], left=0, gap=2)
    for name, label in PARTS.items():
        spent = getattr(time, name)
        if spent > 0:
            table.add_row(label, seconds(spent), f"{spent / time.total_s:.1%}")
    table.add_section()
    table.add_row("total", Text(seconds(time.total_s), style="bold"), "100.0%")
    return table


def _side_by_side(left: Table, right: Table, screen: Console) -> Table | Group:
    widths = [screen.measure(table).maximum for table in (left, right)]
    if sum(widths) + 3 > screen.width:
        return Group(left, "", right)
    grid = Table.grid(padding=(0, 3, 0, 0))
    grid.add_row(left, right)
    return grid


def _verdict(plan: Plan) -> Text:
    """Say whether the recipe fits, and what would."""
    chosen, limit = plan.chosen, plan.hardware.memory_bytes
    size = f"{gib(chosen.memory.total)} of {gib(limit)} GiB"
    most = f"the largest micro-batch that fits is {_rows(chosen.most_micro_rows)}"
    if chosen.fits:
        return Text.assemble(("fits", "bold green"), f": {size}; {most}")
    if chosen.most_micro_rows:
        return Text.assemble(("does not fit", "bold red"), f": {size}; {most} (batch.micro_rows)")
    remedy = "no micro-batch fits: see below what would, or take more GPUs"
    return Text.assemble(("does not fit", "bold red"), f": {size}; {remedy}")


def _what_if(plan: Plan) -> list[tuple[str, Table]]:
    checkpointing = "With other checkpointing (objective.checkpoint_trunk, checkpoint_heads)"
    strategy = "With another strategy (strategy.kind, offload_optimizer, offload_parameters)"
    tables = [(checkpointing, _checkpointing_table(plan)), (strategy, _strategies_table(plan))]
    if any(plan.scales):
        title = f"On more or fewer GPUs, the same {plan.recipe.batch.rows:,} rows per step"
        tables.append((title, _scales_table(plan)))
    return tables


def _checkpointing_table(plan: Plan) -> Table:
    columns = ["recomputed", "trunk\nGiB", "heads\nGiB", "total\nGiB", "fits", "largest\nmicro-batch", "s/step", "MFU"]
    table = build_table(columns, left=0, gap=2)
    names = ["nothing", "heads", "trunk", "trunk and heads"]
    for name, variant in zip(names, plan.checkpointing, strict=True):
        kept: Memory = variant.memory
        row = [name, gib(kept.trunk_activations), gib(kept.head_activations), gib(kept.total)]
        table.add_row(*row, *_fit(variant), *_speed(variant), style=_style(variant, plan))
    return table


def _strategies_table(plan: Plan) -> Table:
    columns = ["strategy", "state\nGiB", "total\nGiB", "on host\nGiB", "fits", "largest\nmicro-batch"]
    columns += ["gather\nGB/step", "reduce\nGB/step", "s/step", "MFU"]
    table = build_table(columns, left=0, gap=2)
    for variant in plan.strategies:
        sent = [f"{sent / GIGA:,.1f}" for sent in variant.communication_bytes.values()]
        needed = variant.memory
        sizes = [gib(needed.state), gib(needed.total), gib(needed.offloaded) if needed.offloaded else BLANK]
        row = [_strategy_name(variant), *sizes, *_fit(variant), *sent, *_speed(variant)]
        table.add_row(*row, style=_style(variant, plan))
    return table


def _strategy_name(variant: Variant) -> str:
    """Name a strategy with what it offloads, o for the optimizer and w for weights."""
    layout = variant.layout
    moved = {"o": layout.offload_optimizer, "w": layout.offload_parameters}
    places = {place: "+".join(name for name in moved if moved[name] == place) for place in ("cpu", "nvme")}
    return " ".join([variant.kind, *(f"{names}>{place}" for place, names in places.items() if names)])


def _scales_table(plan: Plan) -> Table:
    columns = ["GPUs", "micro-\nbatches", "total\nGiB", "fits", "largest\nmicro-batch"]
    columns += ["s/step", "MFU", "tokens/s\nper GPU", "whole run", "GPU-hours"]
    table = build_table(columns, left=-1, gap=2)
    for num_gpus, variant in zip(SCALES, plan.scales, strict=True):
        if variant is None:
            continue
        layout = variant.layout
        row = [f"{num_gpus:,}", f"{layout.num_micro_batches:,} x {layout.micro_rows}", gib(variant.memory.total)]
        cost = [f"{variant.tokens_per_s:,.0f}", duration(variant.days), _hours(variant.gpu_hours)]
        table.add_row(*row, *_fit(variant), *_speed(variant), *cost, style=_style(variant, plan))
    return table


def _fit(variant: Variant) -> list[str]:
    return ["yes" if variant.fits else "no", str(variant.most_micro_rows or BLANK)]


def _speed(variant: Variant) -> list[str]:
    return [seconds(variant.time.total_s), f"{variant.mfu:.1%}"]


def _style(variant: Variant, plan: Plan) -> str:
    """Set the recipe's own way apart, and what does not fit."""
    if variant.layout == plan.chosen.layout:
        return "bold"
    return "" if variant.fits else "dim"


def _remarks(plan: Plan) -> list[str]:
    device, recipe = plan.hardware, plan.recipe
    remarks = [
        "GiB: 2^30 bytes, GB: 10^9. o>cpu, w>cpu: optimizer state, weights in the host's memory. Times are "
        "predictions, held against published FSDP runs of 3B and 13B models on A100 and H100."
    ]
    if device.fitted_as != device.name and device.fitted_as == "H100":
        remarks.append(f"{device.name}: no published run is at hand; efficiencies are those fitted to H100.")
    if recipe.strategy.kind == "single":
        remarks.append("strategy.kind is single: several GPUs are planned as zero1.")
    missing = [f"{num_gpus:,}" for num_gpus, variant in zip(SCALES, plan.scales, strict=True) if variant is None]
    if missing:
        remarks.append(f"{recipe.batch.rows:,} rows per step (batch.rows) cannot be shared by {one_of(missing)} GPUs.")
    if recipe.run.precision == "fp32":
        remarks.append("fp32 is planned at the rate of the ordinary cores; efficiencies are those fitted to bf16.")
    return remarks


def gib(number_bytes: float) -> str:
    """Format bytes as GiB.

    >>> gib(3 * GIB)
    '3.00'
    """
    value = number_bytes / GIB
    if value < 0.001:
        return "<0.001"
    return f"{value:,.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


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


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"


def _short(count: float) -> str:
    for name, size in {" T": 1e12, " B": 1e9, " M": 1e6, " k": 1e3}.items():
        if count >= size:
            return f"{count / size:#.3g}".rstrip(".") + name
    return f"{count:.0f}"
