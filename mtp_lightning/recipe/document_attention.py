"""How attention is kept inside documents: one by one, or by a mask over the window."""

from mtp_lightning.recipe.schema.root import Recipe

WIDEST_HEAD = 256
"""Channels of a head that flash attention takes at most, in multiples of 8."""


def attends_one_by_one(recipe: Recipe, device: str) -> bool:
    """Tell whether documents of a window are attended to one by one on a type of device, without a (T, T) mask.

    Flash attention over variable lengths does so in half precision on a GPU. The layers of transformers take masks,
    and a rollout needs one over its two streams.

    >>> recipe = Recipe.model_validate({"data": {"document_mask": True}, "run": {"precision": "bf16"}})
    >>> attends_one_by_one(recipe, "cuda"), attends_one_by_one(recipe, "cpu")
    (True, False)
    """
    model = recipe.model
    if device == "cpu" or not recipe.data.document_mask or model.is_foreign or recipe.objective.rollout is not None:
        return False
    return (
        recipe.run.precision != "fp32" and model.resolved_head_dim % 8 == 0 and model.resolved_head_dim <= WIDEST_HEAD
    )
