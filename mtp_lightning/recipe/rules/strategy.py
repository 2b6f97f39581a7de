"""Rules between ranks, batch, offloading and precision; reserved DeepSpeed keys."""

from collections.abc import Mapping
from typing import Any

from mtp_lightning.recipe.rules.base import Rule, divisors
from mtp_lightning.recipe.schema.describe import one_of
from mtp_lightning.recipe.schema.root import Recipe, StrategySection

RESERVED_DEEPSPEED_KEYS = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.micro_batch_size",
    "managed_gradient_accumulation": "objective.backward_order",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer",
    "communication_data_type": "strategy.reduce_dtype",
    "amp": "run.precision",
    "torch_autocast": "run.precision",
    "bf16.enabled": "run.precision",
    "fp16.enabled": "run.precision",
    "zero_optimization.stage": "strategy.kind",
    "zero_optimization.offload_optimizer.device": "strategy.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "strategy.nvme_path",
    "zero_optimization.offload_param.device": "strategy.offload_parameters",
    "zero_optimization.offload_param.nvme_path": "strategy.nvme_path",
}
"""DeepSpeed's keys that are generated from a field: two places for one setting would contradict each other."""


def keys_owned_by_recipe(raw: Mapping[str, Any]) -> list[str]:
    """List the raw DeepSpeed keys that another field of the recipe decides.

    >>> keys_owned_by_recipe({"zero_optimization": {"stage": 3, "reduce_bucket_size": 5}})
    ['zero_optimization.stage']
    """
    return [key for key in RESERVED_DEEPSPEED_KEYS if _value_at(raw, key) is not None]


def owned_remedy(raw: Mapping[str, Any]) -> str:
    """Say which field to set in the place of each such key."""
    wanted = [f"{key} with {RESERVED_DEEPSPEED_KEYS[key]}" for key in keys_owned_by_recipe(raw)]
    return f"Set {one_of(wanted, 'and')}."


def _value_at(raw: Any, key: str) -> Any:
    for name in key.split("."):
        raw = raw.get(name) if isinstance(raw, Mapping) else None
    return raw


def _global_rows_divide(recipe: Recipe) -> bool:
    """Leave the case of micro_batch_size that do not even divide rows to the rule about these two."""
    rows, micro_batch_size = recipe.batch.global_batch_size, recipe.batch.micro_batch_size
    is_other_fault = recipe.strategy.kind == "single" or rows % micro_batch_size != 0
    return is_other_fault or rows % (recipe.strategy.num_shares * micro_batch_size) == 0


def _rows_remedy(recipe: Recipe) -> str:
    num_shares, rows = recipe.strategy.num_shares, recipe.batch.global_batch_size
    whose = "ranks" if recipe.strategy.sequence_parallel == 1 else "groups of ranks"
    if rows % num_shares:
        multiple = max(1, round(rows / num_shares)) * num_shares
        return (
            f"Each of {num_shares} {whose} takes an equal share: set batch.global_batch_size to {multiple}, "
            "or change strategy."
        )
    share = rows // num_shares
    return f"Each of {num_shares} {whose} takes {share}: set batch.micro_batch_size to {divisors(share)}."


def _offloads(strategy: StrategySection, *places: str) -> bool:
    return strategy.offload_optimizer in places or strategy.offload_parameters in places


STRATEGY_RULES: tuple[Rule, ...] = (
    Rule(
        fields=(
            "batch.global_batch_size",
            "strategy.num_nodes",
            "strategy.ranks_per_node",
            "batch.micro_batch_size",
        ),
        holds=_global_rows_divide,
        expected="must be a multiple of the ranks (strategy.num_nodes x ranks_per_node) times batch.micro_batch_size",
        hint=_rows_remedy,
    ),
    Rule(
        fields=("strategy.reduce_dtype", "run.precision"),
        holds=lambda recipe: recipe.strategy.reduce_dtype == "fp32" or recipe.run.precision == "bf16",
        expected="must be fp32 unless run.precision is bf16",
        hint="Set strategy.reduce_dtype=fp32, or run.precision=bf16.",
    ),
    Rule(
        fields=("strategy.kind", "strategy.num_nodes", "strategy.ranks_per_node"),
        holds=lambda recipe: recipe.strategy.kind != "single" or recipe.strategy.num_ranks == 1,
        expected="must be zero1, zero2 or zero3 for more than one rank",
        hint="Set strategy.kind=zero2, or one node and one rank per node.",
    ),
    Rule(
        fields=("strategy.elastic", "strategy.kind"),
        holds=lambda recipe: recipe.strategy.kind != "single" or not recipe.strategy.elastic,
        expected="must be false where strategy.kind is single, which is one rank",
        hint="Set strategy.kind=zero1, zero2 or zero3.",
    ),
    Rule(
        fields=("strategy.kind", "strategy.offload_optimizer", "strategy.offload_parameters"),
        holds=lambda recipe: recipe.strategy.kind != "single" or not _offloads(recipe.strategy, "cpu", "nvme"),
        expected="must be zero1, zero2 or zero3 to offload: DeepSpeed does it",
        hint="Set strategy.kind=zero2 (zero3 for parameters), or offload nothing.",
    ),
    Rule(
        fields=("strategy.offload_parameters", "strategy.kind"),
        holds=lambda recipe: (
            recipe.strategy.offload_parameters == "none" or recipe.strategy.kind in ("single", "zero3")
        ),
        expected="must be none unless strategy.kind is zero3, which alone shards the parameters",
        hint="Set strategy.kind=zero3, or strategy.offload_parameters=none.",
    ),
    Rule(
        fields=("strategy.offload_optimizer", "strategy.offload_parameters", "run.device"),
        holds=lambda recipe: recipe.run.device != "cpu" or not _offloads(recipe.strategy, "cpu", "nvme"),
        expected="must be none when run.device is cpu: there is no GPU to offload from",
        hint="Offload nothing, or set run.device=cuda.",
    ),
    Rule(
        fields=("strategy.deepspeed",),
        holds=lambda recipe: not keys_owned_by_recipe(recipe.strategy.deepspeed),
        expected="must not set what other fields of the recipe decide",
        hint=lambda recipe: owned_remedy(recipe.strategy.deepspeed),
    ),
    Rule(
        fields=("run.precision", "strategy.kind"),
        holds=lambda recipe: recipe.run.precision != "fp16" or recipe.strategy.kind != "single",
        expected="must be fp32 or bf16 for strategy.kind single: DeepSpeed does the loss scaling of fp16",
        hint="Set run.precision=bf16, or strategy.kind=zero1 (one rank will do).",
    ),
    Rule(
        fields=("run.precision", "run.device"),
        holds=lambda recipe: recipe.run.precision != "fp16" or recipe.run.device != "cpu",
        expected="must be fp32 or bf16 when run.device is cpu, which has no fp16 arithmetic worth the name",
        hint="Set run.precision=bf16.",
    ),
    Rule(
        fields=("strategy.nvme_path", "strategy.offload_optimizer", "strategy.offload_parameters"),
        holds=lambda recipe: recipe.strategy.nvme_path is not None or not _offloads(recipe.strategy, "nvme"),
        expected="must name a folder on a local disk to offload to nvme",
        hint="Give strategy.nvme_path, or offload to cpu.",
    ),
)
