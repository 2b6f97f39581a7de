"""Keys and values of earlier positions, in the words that layers of transformers ask for them with."""

from typing import Any, final

from torch import Tensor

from mtp_lightning.errors import DecodingError
from mtp_lightning.model.positions import KVCache

MASK = "attention_mask"
ALIBI = ("alibi", "position_bias")
PAST = ("past_key_values", "layer_past", "past_key_value", "cache_params")
"""Names by which layers take their mask, what is added by distance, and keys and values of earlier positions."""
GENERATE_ELSEWHERE = "Generate with transformers; training, evaluation of the loss and export work"


@final
class UnknownPastError(DecodingError, AttributeError):
    """A layer asks its past for what it does not have; an AttributeError to those who only look whether it has."""


class PastLength:
    """Says how long the past is: what a decoder asks of a cache before its layers run."""

    is_compileable = False
    is_sliding = ()

    def __init__(self, num_positions: int, reach: int) -> None:
        """Stand for a past of `reach` positions S, of which the last T are those of the pass itself."""
        self.num_positions, self.reach = num_positions, reach

    def get_seq_length(self, _layer: int = 0) -> int:
        """Count the positions before those of the pass."""
        return self.reach - self.num_positions

    get_query_offset = get_seq_length

    def get_mask_sizes(self, _num_queries: int, _layer: int = 0) -> tuple[int, int]:
        """Return the width of masks and the first position that they show."""
        return self.reach, 0

    def has_previous_state(self, *_: object, **__: object) -> bool:
        """Tell whether there are positions before those of the pass."""
        return self.reach > self.num_positions


@final
class LayerPast(PastLength):
    """The keys and values of one layer."""

    def __init__(self, past: KVCache, layer: object) -> None:
        super().__init__(past.num_positions, past.reach)
        self._past, self._layer = past, layer

    def update(self, key: Tensor, value: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Keep those of new positions and return all: two (B, K, T, W) -> two (B, K, S, W)."""
        return self._past.extend(self._layer, key, value)

    def __getattr__(self, name: str) -> Any:
        raise UnknownPastError(
            "layers must keep keys and values alone, each its own, for texts to be generated",
            f"{type(self._layer).__name__}, which asks its past for {name}",
            GENERATE_ELSEWHERE,
        )
