"""Who owns the layers: trunk or heads. Model, planner and the rules of a recipe all ask here."""

from mtp_lightning.recipe.head_kinds import registered
from mtp_lightning.recipe.schema.root import Recipe


def num_head_layers(recipe: Recipe) -> int:
    """Count the transformer layers inside all heads together.

    Parallel and chained heads have a main head of their own; sequential and recursive modules predict offset 1
    from the trunk alone; linear maps and Medusa blocks hold no transformer layers.

    >>> num_head_layers(Recipe())
    4
    """
    heads = recipe.heads
    if (own := registered(heads.kind)) is not None:
        return sum(own.num_layers(heads, offset) for offset in range(1, heads.num_offsets + 1))
    layers_of_kind = {
        "parallel": heads.num_offsets * heads.layers_per_head,
        "chained": heads.num_offsets * heads.layers_per_head,
        "sequential": (heads.num_offsets - 1) * heads.layers_per_head,
        "recursive": heads.layers_per_head if heads.num_offsets > 1 else 0,
        "linear": 0,
        "medusa": 0,
    }
    return layers_of_kind[heads.kind]


def num_trunk_layers(recipe: Recipe) -> int:
    """Count the layers left to the trunk out of `model.num_hidden_layers`; below 1 the recipe is refused.

    With `heads.layers_from_trunk` all layers inside heads are taken from the trunk. Without it only the main head's
    are, so that one offset is the same next-token model for every kind.

    >>> num_trunk_layers(Recipe())
    4
    """
    return recipe.model.num_hidden_layers - num_layers_from_trunk(recipe)


def num_layers_from_trunk(recipe: Recipe) -> int:
    """Count the layers that the heads take out of the trunk."""
    if recipe.heads.layers_from_trunk:
        return num_head_layers(recipe)
    if (own := registered(recipe.heads.kind)) is not None:
        return own.num_layers(recipe.heads, 1)
    return recipe.heads.layers_per_head if recipe.heads.kind in ("parallel", "chained") else 0
