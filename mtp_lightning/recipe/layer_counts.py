"""The tree of heads, and who owns the layers: trunk or heads. Model, planner and the rules of a recipe all ask here."""

from mtp_lightning.recipe.schema.model import HeadsSection
from mtp_lightning.recipe.schema.root import Recipe

TRUNK = 0  # the trunk's output stands in the place of an offset where heads name what they read


def parent_offset(heads: HeadsSection, offset: int) -> int:
    """Return the offset whose state this one reads, or `TRUNK`.

    >>> chain = HeadsSection(kind="chained", order="anticausal", num_offsets=4)
    >>> [parent_offset(chain, offset) for offset in (1, 2, 3, 4)]
    [2, 3, 4, 0]
    """
    if heads.kind in ("parallel", "linear", "medusa"):
        return TRUNK
    if (heads.kind, heads.order) == ("chained", "anticausal"):
        return TRUNK if offset == heads.num_offsets else offset + 1
    return offset - 1


def norm_before(heads: HeadsSection, offset: int) -> int | None:
    """Return the offset whose final norm a state passes before this offset reads it; None for no norm.

    >>> norm_before(HeadsSection(kind="medusa"), 3), norm_before(HeadsSection(kind="parallel"), 3)
    (1, None)
    """
    if offset == 1:
        return None
    if heads.kind == "medusa":
        return 1
    return offset - 1 if heads.kind in ("sequential", "recursive") and heads.hidden == "post_norm" else None


def has_final_norm(heads: HeadsSection, offset: int) -> bool:
    """Return whether this offset's state passes a final norm before the unembedding."""
    return offset == 1 or heads.kind != "medusa"


def detaches_input(heads: HeadsSection, offset: int, parent: int) -> bool:
    """Return whether this offset's gradients stop before the state that it reads (`heads.detach_trunk`)."""
    return heads.detach_trunk and offset > 1 and parent in (TRUNK, 1)


def num_head_layers(recipe: Recipe) -> int:
    """Count the transformer layers inside all heads together.

    Parallel and chained heads have a main head of their own; sequential and recursive modules predict offset 1
    from the trunk alone; linear maps and Medusa blocks hold no transformer layers.

    >>> num_head_layers(Recipe())
    4
    """
    heads = recipe.heads
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
    return recipe.heads.layers_per_head if recipe.heads.kind in ("parallel", "chained") else 0
