"""The section of adaptation: what of a pretrained model is frozen, and what is added to it."""

from typing import Annotated, Literal

from pydantic import Field

from mtp_lightning.recipe.schema.base import PositiveFloat, PositiveInt, Section

BELOW = "offsets_below_"
FrozenPart = Annotated[str, Field(pattern=rf"^(trunk|heads|unembedding|lora|layer_mix|{BELOW}\d+)$")]

Target = Literal["q", "k", "v", "o", "gate", "up", "down"]


class LoraSection(Section):
    """Low-rank updates of the trunk's matrices, W + alpha / rank x B A; of the trunk nothing else is trained."""

    rank: PositiveInt = 8
    """Rows of A and columns of B."""
    alpha: PositiveFloat = 16.0
    """Scale of the update, times rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the channels that A reads which are set to zero in training."""
    targets: list[Target] = Field(default=["q", "k", "v"], min_length=1)
    """Projections that are updated, in every layer."""
    in_heads: bool = False
    """Also update the projections of the layers inside heads; these stay trained themselves unless they are frozen."""


class LayerMixSection(Section):
    """What a head reads of the trunk: not its last layer, but softmax(w / T) over all layers, w its own [Mehra 2025].

    The embedding is not among the layers; heads that read another offset are left as they are.
    """

    temperature: PositiveFloat = 0.1
    """T: the smaller, the faster a head settles on few layers."""
    init: float = 0.1
    """What every weight starts as; the mixture starts as the mean of all layers."""
    main_head: bool = True
    """Also for the main head, which then no longer starts as the model's own; false leaves it the last layer."""


class AdaptSection(Section):
    """Adaptation of a pretrained model; as it is by default, all of a model is trained and nothing is added."""

    lora: LoraSection | None = None
    """Low-rank updates of the trunk, or null."""
    layer_mix: LayerMixSection | None = None
    """Mixtures of the trunk's layers for the heads to read, or null."""
