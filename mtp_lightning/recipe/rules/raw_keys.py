"""Which of DeepSpeed's own keys a recipe may set by `strategy.deepspeed`, and which its fields decide."""

from collections.abc import Mapping
from typing import Any

from mtp_lightning.recipe.schema.describe import one_of

RESERVED_DEEPSPEED_KEYS = {
    "train_batch_size": "batch.global_batch_size",
    "train_micro_batch_size_per_gpu": "batch.micro_batch_size",
    "gradient_accumulation_steps": "batch.micro_batch_size",
    "managed_gradient_accumulation": "objective.backward_order",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer",
    "scheduler": "optimizer",
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
