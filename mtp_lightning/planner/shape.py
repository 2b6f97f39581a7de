"""A model as the planner sees it: widths, layers and parameters, of a recipe or of a published model."""

import math
from dataclasses import dataclass

from mtp_lightning.planner.counts import (
    ParameterCounts,
    kept_entries,
    layer_weights,
    parameter_counts,
    trainable_parameters,
)
from mtp_lightning.planner.passes import ALL_PROJECTIONS, BackwardFlow, backward_flow_of
from mtp_lightning.recipe.document_attention import attends_one_by_one
from mtp_lightning.recipe.draft_vocabulary import draft_vocab_size
from mtp_lightning.recipe.head_kinds import registered
from mtp_lightning.recipe.layer_counts import num_head_layers, num_trunk_layers
from mtp_lightning.recipe.schema.root import Recipe

CHAINED_KINDS = ("chained", "sequential", "recursive")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One transformer layer."""

    width: int
    matrices: int  # entries of all matrices
    query_width: int
    key_width: int
    key_heads: int = 1
    intermediate_size: int
    is_gated: bool = True  # SwiGLU: three matrices, not two
    num_residuals: int = 2  # inputs of norms: one where attention and feed-forward read the same

    def exchanged_key_width(self, num_slices: int) -> int:
        """Width of keys where attention is shared out over so many GPUs, which repeat heads that are too few.

        >>> layer = Layer(width=8, matrices=0, query_width=8, key_width=4, key_heads=2, intermediate_size=8)
        >>> layer.exchanged_key_width(2), layer.exchanged_key_width(4)
        (4, 8)
        """
        return self.key_width * (num_slices // math.gcd(num_slices, self.key_heads))

    def mlp_states(self, keeps: frozenset[str] = ALL_PROJECTIONS) -> int:
        """Count the entries per position that the backward pass of the feed-forward reads.

        The last projection's input is among them only where the gradient of its matrix, or of its update, is wanted.
        """
        return ((3 if self.is_gated else 1) + ("down" in keeps)) * self.intermediate_size

    def input_copies(self, keeps: frozenset[str], *, are_cast: bool) -> int:
        """Count the normed states that are kept for gradients of the projections which read them.

        Projections of the same input share one, unless each casts it for itself.
        """
        readers = [{"q", "k", "v"} & keeps, {"up", *(["gate"] if self.is_gated else [])} & keeps]
        return sum(len(group) if are_cast else bool(group) for group in readers)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What lies between trunk and unembedding."""

    num_offsets: int = 1
    num_layers: int = 0  # transformer layers in all heads together
    is_chain: bool = False  # a head reads another: the activations of all are alive together


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Everything about a model that memory and time depend on."""

    parameters: ParameterCounts
    num_trainable: int  # parameters with gradients and optimizer state
    num_kept: int | None = None  # entries of moments and averages; None: two moments of each trained parameter
    passes: BackwardFlow  # what a position goes through
    layer: Layer
    num_trunk_layers: int
    heads: Heads = Heads()
    vocab_size: int
    draft_vocab_size: int | None = None  # V' of a draft vocabulary
    seq_len: int
    masks_documents: bool = False  # keeps attention inside them by a mask, with which no product is skipped

    @property
    def matrix(self) -> int:
        """Entries of one V x D matrix."""
        return self.vocab_size * self.layer.width

    @property
    def draft_matrix(self) -> int:
        """Entries of the rows that score a draft vocabulary; 0 without one."""
        return (self.draft_vocab_size or 0) * self.layer.width

    @property
    def num_walked(self) -> int:
        """Parameters of what the backward pass goes through: all but a trunk, or heads, without a gradient path."""
        trunk, heads = self.passes.trunk.work, self.passes.heads.work
        unwalked = (0 if trunk.needs_backward else self.parameters.trunk) + (
            0 if heads.needs_backward else self.parameters.heads
        )
        return self.parameters.total - unwalked

    @property
    def flops_per_position(self) -> int:
        """Operations per position, counted as in `flops.py`."""
        return self.passes.flops(self.layer.query_width * self.seq_len)


def shape_of(recipe: Recipe) -> Shape:
    """Describe a recipe's model.

    >>> from mtp_lightning.planner.flops import flops_per_position
    >>> shape_of(Recipe()).flops_per_position == flops_per_position(Recipe())
    True
    """
    heads = recipe.heads
    return Shape(
        parameters=parameter_counts(recipe),
        num_trainable=trainable_parameters(recipe),
        num_kept=kept_entries(recipe),
        passes=backward_flow_of(recipe),
        layer=_layer_of(recipe),
        num_trunk_layers=num_trunk_layers(recipe),
        heads=Heads(
            num_offsets=heads.num_offsets,
            num_layers=num_head_layers(recipe),
            is_chain=_is_chain(recipe),
        ),
        vocab_size=recipe.model.vocab_size,
        draft_vocab_size=None if recipe.heads.draft_vocabulary is None else draft_vocab_size(recipe),
        seq_len=recipe.data.seq_len,
        masks_documents=recipe.data.document_mask
        and not attends_one_by_one(recipe, "cpu" if recipe.run.device == "cpu" else "cuda"),
    )


def _is_chain(recipe: Recipe) -> bool:
    own, offsets = registered(recipe.heads.kind), range(1, recipe.heads.num_offsets + 1)
    if own is not None:
        return any(own.parent(recipe.heads, offset) for offset in offsets)
    return recipe.heads.kind in CHAINED_KINDS


def _layer_of(recipe: Recipe) -> Layer:
    model = recipe.model
    return Layer(
        width=model.hidden_size,
        matrices=layer_weights(model).matrices,
        query_width=model.num_attention_heads * model.resolved_head_dim,
        key_width=model.resolved_key_value_heads * model.resolved_head_dim,
        key_heads=model.resolved_key_value_heads,
        intermediate_size=model.resolved_intermediate_size,
        is_gated=model.mlp == "swiglu",
        num_residuals=1 if model.parallel_residual else 2,
    )
