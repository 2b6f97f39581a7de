"""The same recipe with another number of offsets or another schedule: the cells of a benchmark table."""

from mtp_lightning.errors import Fault
from mtp_lightning.recipe.rules.all import check_rules
from mtp_lightning.recipe.schema.objective import ConstantWeights
from mtp_lightning.recipe.schema.root import Recipe


def with_offsets(recipe: Recipe, num_offsets: int) -> Recipe:
    """Change the number of offsets; every offset gets weight 1, because one of weight 0 would not be computed.

    With one offset there is nothing to distil. With `heads.layers_from_trunk` the number of layers stays what it is.

    >>> with_offsets(Recipe(), 8).heads.num_offsets
    8
    """
    distill = recipe.objective.distill if num_offsets > 1 else None
    objective = {"weights": ConstantWeights(), "distill": distill}
    return recipe.model_copy(
        update={
            "heads": recipe.heads.model_copy(update={"num_offsets": num_offsets}),
            "objective": recipe.objective.model_copy(update=objective),
        }
    )


def with_backward_order(recipe: Recipe, schedule: str) -> Recipe:
    """Change the order of head forward and backward.

    >>> with_backward_order(Recipe(), "joint").objective.backward_order
    'joint'
    """
    return recipe.model_copy(update={"objective": recipe.objective.model_copy(update={"backward_order": schedule})})


def obstacle(recipe: Recipe) -> Fault | None:
    """Return what keeps a recipe from running, or None.

    >>> obstacle(Recipe()) is None, obstacle(with_offsets(Recipe(), 8)) is None
    (True, False)
    """
    return next(iter(check_rules(recipe)), None)
