"""A recipe's plan: everything that `mtp plan` shows, as plain values."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from mtp_lightning.errors import MtpError
from mtp_lightning.planner.counts import DiskUse, disk_use, kept_state_bytes
from mtp_lightning.planner.flops import tokens_after, tokens_per_step
from mtp_lightning.planner.hardware import Hardware, hardware
from mtp_lightning.planner.layout import STAGES, Layout, layout_of
from mtp_lightning.planner.memory import Memory, memory, most_micro_rows
from mtp_lightning.planner.shape import Shape, shape_of
from mtp_lightning.planner.throughput import StepTime, communication_bytes, step_time
from mtp_lightning.recipe.schema.root import OptimizerSection, Recipe

SCALES = (8, 16, 32, 64, 128, 256, 512, 1024)
DAY_S = 86_400
HOUR_S = 3_600
KINDS = {stage: kind for kind, stage in STAGES.items()}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to run the recipe, in figures."""

    layout: Layout
    memory: Memory
    fits: bool
    most_micro_rows: int
    time: StepTime
    communication_bytes: dict[str, float]  # that each GPU sends per step
    tokens_per_s: float  # per GPU
    mfu: float
    days: float

    @property
    def kind(self) -> str:
        """Kind of strategy."""
        return KINDS[self.layout.stage]

    @property
    def gpu_hours(self) -> float:
        """GPU time of the whole run."""
        return self.days * DAY_S / HOUR_S * self.layout.num_gpus


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe on paper: as it is, and with one thing changed at a time."""

    recipe: Recipe
    hardware: Hardware
    shape: Shape
    tokens_per_step: int
    flops_per_step: int
    total_tokens: int
    total_flops: int
    disk: DiskUse
    kept_state_bytes: int
    chosen: Variant
    strategies: tuple[Variant, ...]  # ZeRO stages and offloading
    checkpointing: tuple[Variant, ...]  # trunk and heads recomputed or not
    scales: tuple[Variant | None, ...]  # numbers of GPUs in SCALES; None: the rows cannot be shared out evenly

    def as_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "hardware": asdict(self.hardware),
            "parameters": asdict(self.shape.parameters) | {"total": self.shape.parameters.total},
            "trainable_parameters": self.shape.num_trainable,
            "tokens_per_step": self.tokens_per_step,
            "flops_per_step": self.flops_per_step,
            "total_tokens": self.total_tokens,
            "total_flops": self.total_flops,
            "disk": asdict(self.disk) | {"total": self.disk.total, "kept_states": self.kept_state_bytes},
            "chosen": variant_as_json(self.chosen),
            "strategies": [variant_as_json(variant) for variant in self.strategies],
            "checkpointing": [variant_as_json(variant) for variant in self.checkpointing],
            "scales": [
                {"num_gpus": num_gpus} | (variant_as_json(variant) if variant else {"shares_rows_evenly": False})
                for num_gpus, variant in zip(SCALES, self.scales, strict=True)
            ],
        }


def variant_as_json(variant: Variant) -> dict[str, Any]:
    """Return plain values, with what follows from them."""
    values = asdict(variant)
    values["layout"]["kind"] = variant.kind
    values["memory"]["total"] = variant.memory.total
    values["time"]["total_s"] = variant.time.total_s
    return values | {"gpu_hours": variant.gpu_hours}


def build_plan(recipe: Recipe, gpu: str = "H100", num_gpus: int | None = None) -> Plan:
    """Put a recipe on paper, on as many GPUs as its strategy says or on another number.

    >>> plan = build_plan(Recipe())
    >>> plan.chosen.fits, plan.tokens_per_step
    (True, 4096)
    """
    _check_share(recipe, num_gpus or recipe.strategy.sequence_parallel)
    device, shape, layout = hardware(gpu), shape_of(recipe), layout_of(recipe, num_gpus)

    def variant(changed: Layout) -> Variant:
        return build_variant(recipe, shape, changed, device)

    return Plan(
        recipe=recipe,
        hardware=device,
        shape=shape,
        tokens_per_step=tokens_per_step(recipe),
        flops_per_step=tokens_per_step(recipe) * shape.flops_per_position,
        total_tokens=tokens_after(recipe, recipe.run.steps),
        total_flops=tokens_after(recipe, recipe.run.steps) * shape.flops_per_position,
        disk=disk_use(recipe),
        kept_state_bytes=kept_state_bytes(recipe),
        chosen=variant(layout),
        strategies=tuple(variant(changed) for changed in _strategies(layout, recipe.optimizer)),
        checkpointing=tuple(
            variant(replace(layout, recomputes_trunk=trunk, recomputes_heads=heads))
            for trunk in (False, True)
            for heads in (False, True)
        ),
        scales=tuple(variant(layout_of(recipe, scale)) if _can_share(recipe, scale) else None for scale in SCALES),
    )


def build_variant(recipe: Recipe, shape: Shape, layout: Layout, device: Hardware) -> Variant:
    """Work one way of running out."""
    needed, time = memory(shape, layout), step_time(shape, layout, device)
    tokens = layout.rows_per_step * shape.seq_len / layout.num_gpus
    per_gpu = tokens / time.total_s
    return Variant(
        layout=layout,
        memory=needed,
        fits=needed.total <= device.memory_bytes,
        most_micro_rows=most_micro_rows(shape, layout, device.memory_bytes),
        time=time,
        communication_bytes=communication_bytes(shape, layout),
        tokens_per_s=per_gpu,
        mfu=per_gpu * shape.flops_per_position / device.peak(layout.precision),
        days=tokens_after(recipe, recipe.run.steps) / (per_gpu * layout.num_gpus) / DAY_S,
    )


def _can_share(recipe: Recipe, num_gpus: int) -> bool:
    num_slices = recipe.strategy.sequence_parallel
    return num_gpus % num_slices == 0 and recipe.batch.global_batch_size % (num_gpus // num_slices) == 0


def _check_share(recipe: Recipe, num_gpus: int) -> None:
    if not _can_share(recipe, num_gpus):
        num_slices, shares = recipe.strategy.sequence_parallel, [str(own) for own in SCALES if _can_share(recipe, own)]
        over = f" / strategy.sequence_parallel={num_slices}" if num_slices > 1 else ""
        raise MtpError(
            f"the rows of a step (batch.global_batch_size) must be a multiple of the number of GPUs{over}",
            f"{recipe.batch.global_batch_size:,} rows for {num_gpus:,} GPUs",
            f"Take {' or '.join(shares[-2:])} GPUs, or change batch.global_batch_size."
            if shares
            else "Change batch.global_batch_size.",
        )


def _strategies(layout: Layout, section: OptimizerSection) -> list[Layout]:
    """List the stages that make a difference, then those that need less of the GPU because the host holds a part.

    Those that the optimizer cannot run under are left out.
    """
    if section.kind == "adafactor":
        return [layout]
    stages = (1, 2, 3) if layout.num_gpus > 1 else (0,)
    on_gpu = [replace(layout, stage=stage, offload_optimizer="none", offload_parameters="none") for stage in stages]
    on_host = [
        replace(layout, stage=2, offload_optimizer="cpu", offload_parameters="none"),
        replace(layout, stage=3, offload_optimizer="cpu", offload_parameters="cpu"),
    ]
    known = on_gpu if section.kind == "muon" or section.ema is not None else [*on_gpu, *on_host]
    return known if layout in known else [*known, layout]
