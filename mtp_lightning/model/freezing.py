"""Freezing: what a run that trains only some heads leaves as it is."""

from collections.abc import Iterable

from torch import Tensor

from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.model.roles import LORA, role_of
from mtp_lightning.recipe.schema.root import Recipe

ADDED = (LORA, "mixtures")
"""Roles of what an adaptation adds: never frozen by a number of offsets."""


def freeze(model: MtpModel, recipe: Recipe) -> None:
    """Freeze what the recipe says; with low-rank updates, also what they are updates of."""
    if recipe.heads.trainable_from is not None:
        freeze_before(model, recipe.heads.trainable_from)
    frozen = {*recipe.adapt.frozen, *(["trunk"] if recipe.adapt.lora else [])}
    for name, parameter in model.named_parameters():
        role = role_of(name)
        if role in ADDED:
            parameter.requires_grad_(role not in frozen)
        elif role in frozen:
            parameter.requires_grad_(False)


def freezes(recipe: Recipe) -> bool:
    """Tell whether a recipe freezes anything."""
    return recipe.heads.trainable_from is not None or bool(recipe.adapt.frozen) or recipe.adapt.lora is not None


def first_taught(recipe: Recipe) -> int:
    """First offset whose loss teaches anything: that of a frozen head does if what it reads is trained."""
    is_updated = recipe.adapt.lora is not None and LORA not in recipe.adapt.frozen
    return 1 if is_updated else recipe.heads.trainable_from or 1


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
    if str(offset) in model.mixtures:
        yield from model.mixtures[str(offset)].parameters()
    for module in model.heads.modules_of(offset):
        yield from module.parameters()
    yield from model.unembedding.parameters_of(offset)
