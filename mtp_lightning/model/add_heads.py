"""Which trained parameter each parameter of a model with more heads, or fewer, starts as."""

import torch

from mtp_lightning.model.freezing import parameters_of
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.recipe.add_heads import copied_offset
from mtp_lightning.recipe.schema.root import Recipe


def parameter_origins(recipe: Recipe, extended: Recipe, group: int) -> dict[str, str]:
    """Name for every parameter of the extended model the trained parameter that it starts as."""
    with torch.device("meta"):
        old, new = MtpModel(recipe), MtpModel(extended)
    old_names = {id(parameter): name for name, parameter in old.named_parameters()}
    new_names = {id(parameter): name for name, parameter in new.named_parameters()}
    origins = {name: name for name in old_names.values()}
    for offset in range(recipe.heads.num_offsets + 1, extended.heads.num_offsets + 1):
        copied = copied_offset(offset, recipe.heads.num_offsets, group)
        for mine, theirs in zip(parameters_of(new, offset), parameters_of(old, copied), strict=True):
            origins.setdefault(new_names[id(mine)], old_names[id(theirs)])
    assert origins.keys() == set(new_names.values())
    return {name: origins[name] for name in new_names.values()}


def kept_parameters(recipe: Recipe, num_offsets: int) -> list[str] | None:
    """Name the parameters of a model that its first offsets are computed with; None where these read further ones."""
    with torch.device("meta"):
        model = MtpModel(recipe)
    offsets = range(1, num_offsets + 1)
    if any(max(model.heads.chain(offset)) > num_offsets for offset in offsets):
        return None
    needed = {id(parameter) for offset in offsets for parameter in parameters_of(model, offset)}
    further = range(num_offsets + 1, recipe.heads.num_offsets + 1)
    dropped = {id(parameter) for offset in further for parameter in parameters_of(model, offset)} - needed
    return [name for name, parameter in model.named_parameters() if id(parameter) not in dropped]
