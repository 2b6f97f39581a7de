"""A recipe with more offsets, whose heads start as copies of trained ones [MTP-D, arXiv 2603.23911].

The last G trained heads are copied in their order, again and again, and the chain goes on: the first copy reads the
last trained head. A recursive module has nothing to copy; it is unrolled further.
"""

from typing import Any

from mtp_lightning.errors import CheckpointError, RecipeError
from mtp_lightning.recipe.layer_counts import num_head_layers
from mtp_lightning.recipe.rules.all import check_rules
from mtp_lightning.recipe.schema.root import Recipe

CHAINING_KINDS = ("sequential", "recursive", "chained")


def copied_offset(offset: int, num_trained: int, group: int) -> int:
    """Tell which trained offset an offset of the extended model is a copy of; trained ones are their own.

    >>> [copied_offset(offset, 5, 4) for offset in range(1, 11)]
    [1, 2, 3, 4, 5, 2, 3, 4, 5, 2]
    """
    if offset <= num_trained:
        return offset
    return num_trained - group + 1 + (offset - num_trained - 1) % group


def extended_recipe(recipe: Recipe, num_offsets: int, group: int) -> Recipe:
    """Give a recipe more offsets: the trunk keeps its layers, weights of losses are those of the copied offsets.

    Raises:
        CheckpointError: the heads do not chain, there is no trained one to copy, or fewer offsets are asked for.
        RecipeError: the extended recipe breaks a rule, such as a window that is too short.
    """
    _check_chaining(recipe, num_offsets, group)
    trained, values = recipe.heads.num_offsets, recipe.model_dump()
    copied = [copied_offset(offset, trained, group) for offset in range(1, num_offsets + 1)]
    values["heads"]["num_offsets"] = num_offsets
    values["freeze"] = recipe.frozen_parts
    if recipe.heads.layers_from_trunk:
        longer = Recipe.model_validate(values)
        values["model"]["num_hidden_layers"] += num_head_layers(longer) - num_head_layers(recipe)
    objective = values["objective"]
    _repeat(objective["weights"], "values", [offset - 1 for offset in copied])
    for name in ("alpha", "beta"):
        if objective["distill"] is not None and len(objective["distill"][name]) > 1:
            _repeat(objective["distill"], name, [offset - 2 for offset in copied[1:]])
    extended = Recipe.model_validate(values)
    if faults := check_rules(extended):
        raise RecipeError(faults)
    return extended


def _repeat(section: dict[str, Any], name: str, places: list[int]) -> None:
    """Take the values at some places of a list, if there is one."""
    if section.get(name) is not None:
        section[name] = [section[name][place] for place in places]


def _check_chaining(recipe: Recipe, num_offsets: int, group: int) -> None:
    heads = recipe.heads
    if heads.kind not in CHAINING_KINDS or (heads.kind, heads.order) == ("chained", "anticausal"):
        kind = f"{heads.order} chained" if heads.kind == "chained" else heads.kind
        raise CheckpointError(
            "heads can be extended where each reads the one before: sequential, recursive or causal chained ones",
            f"{kind} heads",
            "Train one of those kinds",
        )
    if not 1 <= group < heads.num_offsets:
        raise CheckpointError(
            "the group that is copied must be one or more of the trained heads beyond the first",
            f"a group of {group}, with {heads.num_offsets - 1} of them",
            "Give another size of the group, or train a model with heads.num_offsets of 2 or more",
        )
    if num_offsets < heads.num_offsets:
        raise CheckpointError(
            "an extended model must have as many offsets as before, or more",
            f"{num_offsets} asked for, {heads.num_offsets} trained",
            f"Ask for {heads.num_offsets} or more",
        )
