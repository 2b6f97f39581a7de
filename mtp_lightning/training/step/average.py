"""The exponential moving average of the weights, of each rank's fp32 shards: equal to `torch.optim.swa_utils`."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mtp_lightning.recipe.schema.root import EmaSection
from mtp_lightning.training.strategies.param_shards import ParamShard


@torch.no_grad()
def updated_averages(
    averages: Mapping[str, Tensor], shards: Iterable[ParamShard], section: EmaSection, step: int
) -> Mapping[str, Tensor]:
    """Bring averages up to date, in place, after a 0-based step; the first update takes the weights as they are.

    Args:
        averages: by parameter, each (m,); empty before the first update.
        shards: of this rank, after the step; frozen ones have no average.
        section: of the recipe.
        step: that has just been done.
    """
    if step < section.from_step or (step - section.from_step) % section.every_steps:
        return averages
    weights = {shard.name: shard.weight for shard in shards if shard.is_trainable}
    if not averages:
        return {name: weight.float().clone() for name, weight in weights.items()}
    own = [averages[name] for name in weights]
    torch._foreach_lerp_(own, [weight.float() for weight in weights.values()], 1 - section.decay)
    return averages
