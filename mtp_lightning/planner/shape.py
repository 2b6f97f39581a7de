"""A model as the planner sees it: widths, layers and parameters, of a recipe or of a published model."""

from dataclasses import dataclass

from mtp_lightning.planner.counts import (
    ParameterCounts,
    active_updates,
    head_runs,
    head_weights,
    layer_weights,
    parameter_counts,
    trainable_parameters,
)
from mtp_lightning.recipe.layers import num_head_layers, num_trunk_layers
from mtp_lightning.recipe.sections import Recipe

CHAINED_KINDS = ("chained", "sequential", "recursive")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One transformer layer."""

    width: int
    matrices: int  # entries of all matrices
    query_width: int
    key_width: int
    mlp_width: int
    is_gated: bool = True  # SwiGLU: three matrices, not two
    num_residuals: int = 2  # inputs of norms: one where attention and feed-forward read the same

    @property
    def mlp_states(self) -> int:
        """Entries per position that the backward pass of the feed-forward reads."""
        return (4 if self.is_gated else 2) * self.mlp_width


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What lies between trunk and unembedding."""

    num_offsets: int = 1
    num_layers: int = 0  # transformer layers in all heads together
    runs: int = 1  # times that each is run per position
    matrices: int = 0  # entries of all matrices, in layers and beside them
    is_chain: bool = False  # a head reads another: the activations of all are alive together


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Everything about a model that memory and time depend on."""

    parameters: ParameterCounts
    num_trainable: int | None = None  # parameters with gradients and optimizer state; None for all
    layer: Layer
    num_trunk_layers: int
    heads: Heads = Heads()
    vocabulary: int
    num_matrices: int = 1  # V x D unembedding matrices
    num_products: int = 1  # products with a V x D matrix per position
    num_updates: int = 0  # entries of low-rank updates that a position is multiplied by
    window_tokens: int
    attends_in_document: bool = False  # by a mask, with which no part of the products is skipped

    @property
    def matrix(self) -> int:
        """Entries of one V x D matrix."""
        return self.vocabulary * self.layer.width

    @property
    def num_layer_runs(self) -> int:
        """Layers that a position passes, in trunk and heads."""
        return self.num_trunk_layers + self.heads.runs * self.heads.num_layers

    @property
    def active_parameters(self) -> int:
        """Matrix entries that a position is multiplied by on its way to all losses."""
        heads = self.heads.runs * self.heads.matrices
        return self.num_trunk_layers * self.layer.matrices + heads + self.num_products * self.matrix + self.num_updates

    @property
    def flops_per_position(self) -> int:
        """Model operations per position, counted as in `flops.py`."""
        return 6 * self.active_parameters + 12 * self.num_layer_runs * self.layer.query_width * self.window_tokens


def shape_of(recipe: Recipe) -> Shape:
    """Describe a recipe's model.

    >>> from mtp_lightning.planner.flops import flops_per_position
    >>> shape_of(Recipe()).flops_per_position == flops_per_position(Recipe())
    True
    """
    heads = recipe.heads
    extra = 1 if recipe.objective.token_order else 0
    return Shape(
        parameters=parameter_counts(recipe),
        num_trainable=trainable_parameters(recipe),
        layer=_layer_of(recipe),
        num_trunk_layers=num_trunk_layers(recipe),
        heads=Heads(
            num_offsets=heads.num_offsets,
            num_layers=num_head_layers(recipe),
            runs=head_runs(heads),
            matrices=head_weights(recipe).matrices,
            is_chain=heads.kind in CHAINED_KINDS,
        ),
        vocabulary=recipe.model.vocabulary,
        num_matrices=(heads.num_offsets if heads.unembedding == "replicated" else 1) + extra,
        num_products=heads.num_offsets + extra,
        num_updates=active_updates(recipe),
        window_tokens=recipe.data.window_tokens,
        attends_in_document=recipe.data.attention == "document",
    )


def _layer_of(recipe: Recipe) -> Layer:
    model = recipe.model
    return Layer(
        width=model.width,
        matrices=layer_weights(model).matrices,
        query_width=model.num_attention_heads * model.resolved_head_width,
        key_width=model.resolved_key_value_heads * model.resolved_head_width,
        mlp_width=model.resolved_mlp_width,
        is_gated=model.mlp == "swiglu",
        num_residuals=1 if model.parallel_residual else 2,
    )
