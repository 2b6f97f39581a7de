"""DeepSpeed's configuration as a pure function of the recipe."""

from typing import Any

from mtp_lightning.planner.counts import bucket_entries
from mtp_lightning.recipe.schema.root import Recipe

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}


def zero_config(recipe: Recipe) -> dict[str, Any]:
    """Generate DeepSpeed's configuration of a recipe, with the raw keys of `strategy.deepspeed` merged over it.

    Gradients of low-precision weights accumulate in fp32: a shared unembedding receives n of them per micro-batch.
    Ranks add them up in fp32 as well, unless the recipe says otherwise: then their number and the stage change nothing.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": recipe.batch.micro_batch_size,
        "gradient_clipping": recipe.optimizer.max_grad_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": _zero_optimization(recipe),
        "steps_per_print": 2**31 - 1,
        "timers": {"throughput": {"enabled": False}},  # which waits for the GPU twice a step, for a figure of its own
        "communication_data_type": recipe.strategy.reduce_dtype,
        **_PRECISION[recipe.run.precision],
    }
    if recipe.strategy.offload_optimizer != "none":
        config["zero_force_ds_cpu_optimizer"] = False  # torch's fused AdamW runs on the CPU as well
    return merged(config, recipe.strategy.deepspeed)


_PRECISION: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {
        "bf16": {"enabled": True, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "fp16": {"fp16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}


def _zero_optimization(recipe: Recipe) -> dict[str, Any]:
    strategy, stage = recipe.strategy, STAGES[recipe.strategy.kind]
    section: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": stage == 3,  # ZeRO-1 and 2 reduce what several passes have left; see strategies/zero.py
        "reduce_bucket_size": bucket_entries(recipe),
    }
    for what, place in (("optimizer", strategy.offload_optimizer), ("param", strategy.offload_parameters)):
        if place != "none":
            path = {"nvme_path": strategy.nvme_path} if place == "nvme" else {}
            section[f"offload_{what}"] = {"device": place, "pin_memory": True, **path}
    return section


def merged(config: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return a nested configuration with another laid over it.

    >>> merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4})
    {'a': {'b': 3, 'c': 2}, 'd': 4}
    """
    result = dict(config)
    for key, value in over.items():
        former = result.get(key)
        is_nested = isinstance(former, dict) and isinstance(value, dict)
        result[key] = merged(former, value) if is_nested else value  # type: ignore[arg-type]
    return result
