"""How an optimizer step is cut into micro-batches and spread over GPUs, and variants of a recipe to compare."""

import math
from dataclasses import dataclass, replace
from typing import Any

from mtp_lightning.errors import Fault
from mtp_lightning.planner.counts import bucket_entries
from mtp_lightning.recipe.rules.all import check_rules
from mtp_lightning.recipe.schema.objective import ConstantWeights
from mtp_lightning.recipe.schema.root import Recipe


def with_offsets(recipe: Recipe, num_offsets: int) -> Recipe:
    """Change the number of offsets; every offset gets weight 1, because one of weight 0 would not be computed.

    With one offset there is nothing to distil, and with two no offset reads a draft. With `heads.layers_from_trunk` the
    number of layers stays what it is.

    >>> with_offsets(Recipe(), 8).heads.num_offsets
    8
    """
    distill = recipe.objective.distill if num_offsets > 1 else None
    rollout = recipe.objective.rollout if num_offsets > 2 else None
    objective = {"weights": ConstantWeights(), "distill": distill, "rollout": rollout}
    return recipe.model_copy(
        update={
            "heads": recipe.heads.model_copy(update={"num_offsets": num_offsets}),
            "objective": recipe.objective.model_copy(update=objective),
        }
    )


def with_backward_order(recipe: Recipe, backward_order: str) -> Recipe:
    """Change the order of head forward and backward.

    >>> with_backward_order(Recipe(), "joint").objective.backward_order
    'joint'
    """
    return recipe.model_copy(
        update={"objective": recipe.objective.model_copy(update={"backward_order": backward_order})}
    )


def obstacle(recipe: Recipe) -> Fault | None:
    """Return what keeps a recipe from running, or None.

    >>> obstacle(Recipe()) is None, obstacle(with_offsets(Recipe(), 8)) is None
    (True, False)
    """
    return next(iter(check_rules(recipe)), None)


FP32 = 4
BF16 = 2
GPUS_PER_NODE = 8  # where a recipe does not say
STAGES = {"single": 0, "zero1": 1, "zero2": 2, "zero3": 3}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What memory and time depend on besides the model."""

    stage: int = 3  # of ZeRO; 0: every GPU holds everything
    num_gpus: int
    gpus_per_node: int = 8
    num_slices: int = 1  # of a window, on as many GPUs
    micro_batch_size: int
    num_micro_batches: int = 1  # per optimizer step
    precision: str = "bf16"
    backward_order: str = "sequential"
    chunk_bytes: float = math.inf  # of logits
    recomputes_trunk: bool = False
    recomputes_heads: bool = False
    compiles_loss: bool = False  # its passes over scores, fused
    uses_liger: bool = False  # in place of the package's own loss
    mlp_tile: int | None = None  # positions of a row that feed-forwards run on at a time; None: all of a GPU's
    offloads_activations: bool = False  # of recomputed layers, to the host
    offload_optimizer: str = "none"
    offload_parameters: str = "none"
    bucket_entries: float = 5e8  # reduced together; two such buckets, one being sent (DeepSpeed: reduce_bucket_size)
    reduce_bytes: int = FP32  # of a number of a gradient while ranks add it up
    gradient_bytes: int = FP32  # of a number in the sum that waits for the step (DeepSpeed: grad_accum_dtype)
    live_entries: float = 1e9  # gathered at once under ZeRO-3 (DeepSpeed: stage3_max_live_parameters)

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number in matrix products and in kept activations."""
        return FP32 if self.precision == "fp32" else BF16

    @property
    def is_autocast(self) -> bool:
        """Say whether weights stay fp32 and are cast where they are used; ZeRO keeps them in bf16 beside a master."""
        return self.stage == 0 and self.precision == "bf16"

    @property
    def weight_bytes(self) -> int:
        """Bytes of a weight as the model holds it, and of its gradient."""
        return FP32 if self.is_autocast else self.compute_bytes

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step over all GPUs."""
        return self.num_gpus // self.num_slices * self.micro_batch_size * self.num_micro_batches

    @property
    def num_nodes(self) -> int:
        """Machines."""
        return -(-self.num_gpus // self.gpus_per_node)

    def shards(self, stage: int) -> int:
        """Count the parts that something which ZeRO shards from `stage` on is split into."""
        return self.num_gpus if self.stage >= stage else 1

    def with_rows(self, micro_batch_size: int, rows_per_gpu: int) -> "Layout":
        """Cut the same rows of a GPU into other micro-batches."""
        return replace(self, micro_batch_size=micro_batch_size, num_micro_batches=-(-rows_per_gpu // micro_batch_size))


def layout_of(recipe: Recipe, num_gpus: int | None = None) -> Layout:
    """Describe a recipe's step, on as many GPUs as its strategy says or on another number.

    The rows of a step stay what they are; micro-batches shrink where a GPU's share leaves no other way. On several
    GPUs `single` becomes ZeRO-1, which is data parallelism with its optimizer shared out.

    >>> layout_of(Recipe()).num_micro_batches, layout_of(Recipe(), 4).micro_batch_size
    (1, 4)
    """
    strategy, objective, memory = recipe.strategy, recipe.objective, recipe.memory
    gpus = num_gpus or strategy.num_ranks
    rows_per_gpu = -(-recipe.batch.global_batch_size // max(1, gpus // strategy.sequence_parallel))
    micro_batch_size = _largest_divisor(rows_per_gpu, recipe.batch.micro_batch_size)
    return Layout(
        stage=max(STAGES[strategy.kind], 1 if gpus > 1 else 0),
        num_gpus=gpus,
        gpus_per_node=strategy.ranks_per_node if strategy.num_ranks > 1 else GPUS_PER_NODE,
        num_slices=strategy.sequence_parallel,
        micro_batch_size=micro_batch_size,
        num_micro_batches=rows_per_gpu // micro_batch_size,
        precision=recipe.run.precision,
        backward_order=objective.backward_order,
        chunk_bytes=objective.chunk_bytes("cpu" if recipe.run.device == "cpu" else "cuda"),
        compiles_loss=memory.compile and objective.backward_order != "joint",
        uses_liger=memory.loss_kernel == "liger",
        recomputes_trunk=memory.recompute_trunk,
        recomputes_heads=recipe.recomputes_heads,
        mlp_tile=_tile(memory.mlp_tile, recipe.data.seq_len // strategy.sequence_parallel),
        offloads_activations=memory.offload_activations,
        offload_optimizer=strategy.offload_optimizer,
        offload_parameters=strategy.offload_parameters,
        reduce_bytes=BF16 if strategy.reduce_dtype == "bf16" else FP32,
        gradient_bytes=_gradient_bytes(strategy.deepspeed.get("data_types")),
        **_buffer_sizes(recipe),
    )


def _tile(tile: int | None, num_positions: int) -> int | None:
    return tile if tile and tile < num_positions else None


def _largest_divisor(number: int, most: int) -> int:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return max(divisor for one in small for divisor in (one, number // one) if divisor <= most)


def _gradient_bytes(data_types: Any) -> int:
    """Read what gradients accumulate in, where a recipe sets it by a raw DeepSpeed key.

    >>> _gradient_bytes({"grad_accum_dtype": "bf16"}), _gradient_bytes(None)
    (2, 4)
    """
    given = data_types.get("grad_accum_dtype") if isinstance(data_types, dict) else None
    return BF16 if given in ("bf16", "fp16") else FP32


def _buffer_sizes(recipe: Recipe) -> dict[str, float]:
    """Read sizes of buffers: as the configuration is generated, or as the recipe sets them by raw DeepSpeed keys.

    >>> raw = {"zero_optimization": {"reduce_bucket_size": 1000, "stage3_max_live_parameters": "auto"}}
    >>> _buffer_sizes(Recipe.model_validate({"strategy": {"kind": "zero2", "deepspeed": raw}}))
    {'bucket_entries': 1000.0}
    """
    zero_keys = recipe.strategy.deepspeed.get("zero_optimization")
    names = {"bucket_entries": "reduce_bucket_size", "live_entries": "stage3_max_live_parameters"}
    given = zero_keys if isinstance(zero_keys, dict) else {}
    sizes: dict[str, Any] = {"bucket_entries": bucket_entries(recipe)}
    sizes |= {ours: given[key] for ours, key in names.items() if key in given}
    return {ours: float(size) for ours, size in sizes.items() if isinstance(size, int | float)}
