"""Freezing: what a run that trains only some heads leaves as it is."""

from collections.abc import Iterable

from torch import Tensor

from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.model.roles import LAYER_MIX, LORA, role_of
from mtp_lightning.recipe.schema.root import Recipe

ADDED = (LORA, LAYER_MIX)
"""Roles of what an adaptation adds: never frozen by a number of offsets."""


def freeze(model: MtpModel, recipe: Recipe) -> None:
    """Freeze what the recipe says; with low-rank updates, also what they are updates of."""
    if recipe.first_trained_offset is not None:
        freeze_before(model, recipe.first_trained_offset)
    frozen = {*recipe.frozen_parts, *(["trunk"] if recipe.adapt.lora else [])}
    for name, parameter in model.named_parameters():
        role = role_of(name)
        if role in ADDED:
            parameter.requires_grad_(role not in frozen)
        elif role in frozen:
            parameter.requires_grad_(False)


def freezes(recipe: Recipe) -> bool:
    """Tell whether a recipe freezes anything."""
    return recipe.first_trained_offset is not None or bool(recipe.frozen_parts) or recipe.adapt.lora is not None


def first_taught(recipe: Recipe) -> int:
    """First offset whose loss teaches anything: that of a frozen head does if what it reads is trained."""
    is_updated = recipe.adapt.lora is not None and LORA not in recipe.frozen_parts
    return 1 if is_updated else recipe.first_trained_offset or 1


def freeze_before(model: MtpModel, first_offset: int) -> None:
    """Let only the heads of an offset and those after it be trained, with final norms and matrices of their own.

    Whatever also serves an earlier offset is frozen: the trunk, and an unembedding matrix that is shared.
    """
    offsets = model.heads.offsets
    trained = {id(p) for offset in offsets if offset >= first_offset for p in parameters_of(model, offset)}
    frozen = {id(p) for offset in offsets if offset < first_offset for p in parameters_of(model, offset)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained - frozen)


def parameters_of(model: MtpModel, offset: int) -> Iterable[Tensor]:
    """Yield the parameters of an offset's head, with the mixture that it reads, of its final norm, and its matrix."""
    if str(offset) in model.layer_mix:
        yield from model.layer_mix[str(offset)].parameters()
    for module in model.heads.modules_of(offset):
        yield from module.parameters()
    yield from model.unembedding.parameters_of(offset)
