"""A plan on the screen: what a run needs, what takes the time, and what would change it."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from mtp_lightning.cli.plan_tables import duration, gib, hours, seconds, short, what_if
from mtp_lightning.console.tables import build_table, console, write_json
from mtp_lightning.planner.report import SCALES, Plan
from mtp_lightning.planner.throughput import StepTime
from mtp_lightning.recipe.schema.describe import one_of

LABEL = 13
STOP_HOURS = 50_700  # GPU-hours between unexpected stops of Llama 3 405B's pretraining [arXiv 2407.21783]
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


def write_plans(plans: Sequence[Plan], path: Path) -> None:
    """Write the figures to a file; those of several phases by the names of their recipes."""
    by_name = {plan.recipe.name: plan.as_json() for plan in plans}
    write_json(path, by_name if len(plans) > 1 else plans[0].as_json())


def print_plan(plan: Plan) -> None:
    """Print a plan: the run, memory and time side by side where they fit, and three tables of what would change it."""
    screen = console()
    screen.print(_title(plan), "", _run_lines(plan), "", sep="\n")
    screen.print(_side_by_side(_memory_table(plan), _time_table(plan.chosen.time), screen))
    screen.print("", _verdict(plan), "", sep="\n")
    for title, table in what_if(plan, screen.width):
        screen.print(Text(title, style="bold"), table, "", sep="\n")
    for remark in _table_notes(plan):
        screen.print(remark, style="dim")


def _title(plan: Plan) -> Text:
    layout, name = plan.chosen.layout, plan.hardware.name
    nodes = f" ({layout.num_nodes} nodes of {layout.gpus_per_node})" if layout.num_nodes > 1 else ""
    cut = f", windows over {layout.num_slices} GPUs" if layout.num_slices > 1 else ""
    where = f"{layout.num_gpus} x {name}{nodes}, {plan.chosen.kind}, {layout.precision}{cut}"
    return Text.assemble((plan.recipe.name, "bold"), "  on  ", (where, "bold cyan"))


def _drafts(plan: Plan) -> str:
    """Say how much of the vocabulary offsets beyond the first score; nothing where it is all of it."""
    heads, vocab_size, size = plan.recipe.heads, plan.shape.vocab_size, plan.shape.draft_vocab_size
    if size is None:
        return ""
    if isinstance(heads.draft_vocabulary, str) and heads.draft_token_ids is None:
        return f"of the ids in {heads.draft_vocabulary}, planned as all {vocab_size:,}"
    return f"of {size:,} of {vocab_size:,} ids ({size / vocab_size:.1%}), scored by offsets 2 to {heads.num_offsets}"


def _run_lines(plan: Plan) -> Text:
    """Say what the run is: model, step, cost."""
    chosen = plan.chosen
    lines = {
        "parameters": _parameters(plan),
        "trained": _trained(plan),
        "drafts": _drafts(plan),
        "step": _step(plan),
        "run": f"{plan.recipe.run.steps:,} steps, {short(plan.total_tokens)} tokens, {plan.total_flops:.2e} FLOPs",
        "speed": f"{seconds(chosen.time.total_s)} s per step, {chosen.tokens_per_s:,.0f} tokens/s per GPU, "
        f"MFU {chosen.mfu:.1%}",
        "cost": f"{duration(chosen.days)}, {hours(chosen.gpu_hours)} GPU-hours",
        "stops": _stops(chosen.gpu_hours),
        "disk": f"at most {gib(plan.disk.total)} GiB: {plan.disk.num_checkpoints:,} checkpoints of "
        f"{gib(plan.disk.bytes_each)} GiB",
        "states": f"at most {gib(plan.kept_state_bytes)} GiB in {plan.recipe.memory.cache_hidden_states}, each row once"
        if plan.kept_state_bytes
        else "",
    }
    lines = {label: text for label, text in lines.items() if text}
    return Text("\n").join(Text.assemble((label.ljust(LABEL), "cyan"), text) for label, text in lines.items())


def _stops(gpu_hours: float) -> str:
    """Say how often a long run may stop unexpectedly."""
    if gpu_hours < STOP_HOURS / 10:
        return ""
    return f"about {gpu_hours / STOP_HOURS:.1f} unexpected ones (Llama 3 405B: one per {STOP_HOURS:,} GPU-hours)"


def cost_line(plan: Plan) -> str:
    """Say in one line what a run costs: the line that recipes carry in their headers."""
    chosen = plan.chosen
    return (
        f"{short(plan.total_tokens)} tokens on {chosen.layout.num_gpus} x {plan.hardware.name}: "
        f"{hours(chosen.gpu_hours)} GPU-hours, {duration(chosen.days)} (predicted by `mtp plan`)."
    )


def _parameters(plan: Plan) -> str:
    counts = plan.shape.parameters
    added = {"low-rank updates": counts.lora, "layer mixes": counts.layer_mix}
    return (
        f"{short(counts.total)} ({counts.total:,}): trunk {short(counts.trunk)}, heads {short(counts.heads)}, "
        f"unembedding {short(counts.unembedding)}" + "".join(f", {name} {short(n)}" for name, n in added.items() if n)
    )


def _trained(plan: Plan) -> str:
    """Say how much of a model is trained that is not trained as a whole."""
    shape = plan.shape
    if shape.num_trainable == shape.parameters.total:
        return ""
    way = (
        "gradients pass through the trunk" if shape.passes.trunk.work.needs_backward else "the trunk only runs forward"
    )
    return f"{short(shape.num_trainable)} of them ({shape.num_trainable:,}); {way}"


def _step(plan: Plan) -> str:
    layout = plan.chosen.layout
    share = (
        f"{layout.num_micro_batches} x {layout.micro_batch_size} per GPU" if layout.num_micro_batches > 1 else "at once"
    )
    rows = f"{plan.recipe.batch.global_batch_size:,} rows of {plan.shape.seq_len:,} tokens ({share})"
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
        "optimizer": f"optimizer: {'master, ' if layout.stage else ''}{_kept(plan)}",
        "logits": "logits of all offsets" if layout.backward_order == "joint" else "logits, one chunk",
        "gathered_weights": None if layout.stage else "weights cast to bf16",
    }.get(name)


def _kept(plan: Plan) -> str:
    """Name what the optimizer keeps besides the weights."""
    section = plan.recipe.optimizer
    moments = {
        "adamw": "two moments",
        "muon": "one moment of matrices, two of the rest",
        "adafactor": "rows and columns of one moment",
    }
    return moments[section.kind] + ("" if section.ema is None else ", average")


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
        return Text.assemble(("does not fit", "bold red"), f": {size}; {most} (batch.micro_batch_size)")
    hint = "no micro-batch fits: see below what would, or take more GPUs"
    return Text.assemble(("does not fit", "bold red"), f": {size}; {hint}")


def _table_notes(plan: Plan) -> list[str]:
    device, recipe = plan.hardware, plan.recipe
    table_notes = [
        "GiB: 2^30 bytes, GB: 10^9. o>cpu, w>cpu: optimizer state, weights in the host's memory. Times are "
        "predictions, held against published FSDP runs of 3B and 13B models on A100 and H100."
    ]
    if device.fitted_as != device.name and device.fitted_as == "H100":
        table_notes.append(f"{device.name}: no published run is at hand; efficiencies are those fitted to H100.")
    if recipe.strategy.kind == "single":
        table_notes.append("strategy.kind is single: several GPUs are planned as zero1.")
    missing = [f"{num_gpus:,}" for num_gpus, variant in zip(SCALES, plan.scales, strict=True) if variant is None]
    if missing:
        table_notes.append(
            f"{recipe.batch.global_batch_size:,} rows per step (batch.global_batch_size) cannot be shared by "
            f"{one_of(missing)} GPUs."
        )
    if recipe.run.precision == "fp32":
        table_notes.append("fp32 is planned at the rate of the ordinary cores; efficiencies are those fitted to bf16.")
    return table_notes


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"
