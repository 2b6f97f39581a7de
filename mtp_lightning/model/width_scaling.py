"""Rates and initial values that stay right when a model is made wider: muP [Yang 2022, arXiv 2203.03466].

Under AdamW the entries of a wider matrix step as far as before, and what they do to a state adds up over more of them.
In the maximal update parametrization hidden matrices learn at base / width times the rate and start at
sqrt(base / width) times the standard deviation; what computes scores learns and starts at base / width times both. That
is table 3 of Tensor Programs V, in which no score is multiplied: a model that is exported is an ordinary one.
"""

import math
from collections.abc import Mapping

from torch import nn

from mtp_lightning.model.hidden_matrices import hidden_matrices
from mtp_lightning.model.roles import role_of
from mtp_lightning.recipe.schema.root import OptimizerSection, Recipe

SCORES = "unembedding"  # role of the matrices whose outputs are scores
WHOLE = "unembedding.lm_heads.0.weight"  # (V, D)


def initial_factor(name: str, recipe: Recipe) -> float:
    """Return what the standard deviation of a matrix's initial values is multiplied by.

    >>> recipe = Recipe.model_validate({"model": {"hidden_size": 1024}, "optimizer": {"mup_base_width": 256}})
    >>> names = "trunk.embed_tokens", "trunk.layers.0.mlp.up_proj", "unembedding.lm_heads.0"
    >>> [initial_factor(f"{name}.weight", recipe) for name in names]
    [1.0, 0.5, 0.25]
    """
    base = recipe.optimizer.mup_base_width
    if base is None:
        return 1.0
    ratio = base / recipe.model.hidden_size
    if role_of(name) == SCORES:
        return ratio
    return 1.0 if "embed_tokens" in name else math.sqrt(ratio)


def rate_factors(model: nn.Module, section: OptimizerSection) -> Mapping[str, float]:
    """Return what the rates of a model's trained matrices are multiplied by, where that is not one, by their names."""
    if section.mup_base_width is None:
        return {}
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters() if p.requires_grad}
    scores = {name for name, shape in shapes.items() if role_of(name) == SCORES and len(shape) == 2}
    width = tuple(getattr(whole := model.get_parameter(WHOLE), "ds_shape", whole.shape))[1]
    return dict.fromkeys(hidden_matrices(model) | scores, section.mup_base_width / width)
