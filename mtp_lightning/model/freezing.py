"""Freeze the parameters that a recipe does not train."""

from collections.abc import Iterable

from torch import Tensor

from mtp_lightning.errors import TrainingError
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.model.roles import role_of
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.trainable import TrainableParts


def freeze(model: MtpModel, recipe: Recipe) -> None:
    """Set `requires_grad` of every parameter by the rules of `recipe/trainable.py`."""
    trained = names_trained(model, recipe)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def check_trained(model: MtpModel, recipe: Recipe) -> None:
    """Compare what is trained with what the recipe says: something may have set `requires_grad` since.

    Raises:
        TrainingError: Naming the parameters that differ.
    """
    expected = names_trained(model, recipe)
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if found != expected:
        differing = {"frozen": sorted(expected - found), "trained": sorted(found - expected)}
        raise TrainingError(
            "the parameters that are trained must be those that the recipe trains",
            "; ".join(f"{word} all the same: {', '.join(names[:3])}" for word, names in differing.items() if names),
            "Say in `freeze` of the recipe what is not trained, and leave requires_grad alone",
        )


def names_trained(model: MtpModel, recipe: Recipe) -> set[str]:
    """Name the parameters that a recipe trains.

    With `freeze`, whatever also serves an earlier offset is frozen: the trunk, and an unembedding matrix that is
    shared.
    """
    users: dict[int, set[int]] = {}  # id of a parameter -> offsets that it computes
    for offset in model.heads.offsets:
        for parameter in parameters_of(model, offset):
            users.setdefault(id(parameter), set()).add(offset)
    parts = TrainableParts(recipe)
    fixed = model.untrained
    return {
        name
        for name, parameter in model.named_parameters()
        if name not in fixed and parts.is_trained(role_of(name), users.get(id(parameter), ()))
    }


def parameters_of(model: MtpModel, offset: int) -> Iterable[Tensor]:
    """Yield the parameters of an offset's head, with the mixture that it reads, of its final norm, and its matrix."""
    if str(offset) in model.layer_mix:
        yield from model.layer_mix[str(offset)].parameters()
    for module in model.heads.modules_of(offset):
        yield from module.parameters()
    yield from model.unembedding.parameters_of(offset)
