"""Keys and values of committed positions, preallocated: a slot per position, a length per row, no compaction.

A pass writes the slots of its window and attends to all slots up to each query's own. What lies behind a row's
length is stale: the next window overwrites it before anything attends to it, so rolling back is setting `lengths`.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from mtp_lightning.decode.packed_linear import PACKED
from mtp_lightning.decode.transformers_windows import TransformersWindows
from mtp_lightning.model.heads import TRUNK
from mtp_lightning.model.layers import Geometry, layers_of
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.model.positions import AttentionInputs, KVCache, rotary_tables
from mtp_lightning.recipe.schema.model import ModelSection

MOST_ONE_BY_ONE = 16  # positions of a window; a wider one is masked
Layers = dict[object, tuple[Tensor, Tensor]]


@final
@dataclass(frozen=True)
class Window:
    """The positions that one pass computes, a slot of the cache for each."""

    slots: Tensor  # (B, T) where keys and values go
    geometry: Geometry  # without a past
    reach: int  # S, one more than the last slot
    indices: dict[int, Tensor] = field(default_factory=dict)  # by number of heads, see `Cache.index`


@final
class StackPast(KVCache):
    """The keys and values of one stack of layers, as one window sees them."""

    def __init__(self, layers: Layers, cache: "Cache", window: Window) -> None:
        self.layers = layers
        self.cache = cache
        self.window = window
        self.num_positions, self.reach = window.slots.shape[1], window.reach

    def extend(self, layer: object, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the window's slots and return all up to its last: two (B, K, T, W) -> two (B, K, S, W).

        A layer's slots are allocated when it first comes; keys and values may differ in width.
        """
        pair = self.layers.get(layer)
        if pair is None:
            pair = self.layers[layer] = self.cache.allocate(key), self.cache.allocate(value)
        index = self.cache.index(self.window, key.shape[1])
        for kept, new in zip(pair, (key, value), strict=True):
            kept.view(-1, kept.shape[-1]).index_copy_(0, index, new.reshape(-1, new.shape[-1]))
        return pair[0][:, :, : self.reach], pair[1][:, :, : self.reach]


@final
class RotaryWindows:
    """Prepares what layers of our own are run with: rotary tables are computed once."""

    def __init__(self, capacity: int, section: ModelSection, *, like: Tensor) -> None:
        positions = torch.arange(capacity, device=like.device)[None]
        cos, sin = rotary_tables(positions, section, like=like)
        self._cos, self._sin = cos[0, 0], sin[0, 0]  # (C, R)

    def __call__(self, positions: Tensor, seen: Tensor | None, _key_positions: Tensor) -> AttentionInputs:
        """Prepare a window; see `TransformersWindows`."""
        return AttentionInputs(self._cos[positions][:, None], self._sin[positions][:, None], seen)


@final
class Cache:
    """Keys and values (B, K, C, W) of every layer of trunk and heads that has run; `lengths` of the trunk's rows.

    An offset that shares its module with another (kind `recursive`) has keys and values of its own, as in training.
    The last slot takes what falls behind the end, and is never attended to.
    """

    def __init__(self, model: MtpModel, num_rows: int, capacity: int) -> None:
        weight = model.trunk.embed_tokens.weight
        self.capacity = capacity
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=weight.device)  # (B,)
        self.row_starts = capacity * torch.arange(num_rows, device=weight.device)[:, None]  # (B, 1)
        self._starts: dict[int, Tensor] = {}  # by number of heads K: (B, K, 1)
        self._stacks: dict[int, Layers] = {}  # by offset
        self._slots = torch.arange(capacity, device=weight.device)  # (C,)
        self._goes_one_by_one = not model.section.is_foreign and (weight.device.type, weight.dtype) == PACKED
        self._windows = (
            TransformersWindows(model)
            if model.section.is_foreign
            else RotaryWindows(capacity, model.section, like=weight)
        )

    def window(self, starts: Tensor, num_positions: int, *, reach: int, aligned: bool) -> Window:
        """Open a window of consecutive positions in every row.

        Args:
            starts: (B,) first position of each row.
            num_positions: Length T of the window.
            reach: One more than the last position of any row.
            aligned: All rows start at the same position.
        """
        slots = (starts[:, None] + self._slots[:num_positions]).clamp_(max=self.capacity - 1)  # (B, T)
        reach = min(reach, self.capacity)
        if aligned and (num_positions == 1 or num_positions == reach):
            mask = None
        elif aligned and self._goes_one_by_one and num_positions <= MOST_ONE_BY_ONE:
            mask = None  # a mask changes the order of sums; without it drafting changes not one bit of the scores
        else:
            mask = (self._slots[:reach] <= slots[:, :, None])[:, None]  # (B, 1, T, S)
        return Window(slots, self._windows(slots, mask, self._slots[None, :reach]), reach)

    def tree_window(self, depths: Tensor, ancestry: Tensor, *, reach: int) -> Window:
        """Open a window of tree nodes behind every row's length: a slot for each node, its depth as its position.

        Args:
            depths: (T,) number of ancestors of each node, the root's 0.
            ancestry: (T, T) true where the second node is the first or an ancestor of it.
            reach: One more than the last slot of any row.
        """
        num_nodes = len(depths)
        slots = self.lengths[:, None] + self._slots[:num_nodes]  # (B, T)
        behind = self._slots[:reach] - self.lengths[:, None]  # (B, S) node that a slot holds; negative for the past
        seen = ancestry[:, behind.clamp(0, num_nodes - 1)].transpose(0, 1)  # (B, T, S)
        seen = torch.where((behind < 0)[:, None], True, seen & (behind < num_nodes)[:, None])
        keys = torch.where(
            behind < 0, self._slots[:reach], self.lengths[:, None] + depths[behind.clamp(0, num_nodes - 1)]
        )
        return Window(slots, self._windows(self.lengths[:, None] + depths, seen[:, None], keys), reach)

    def index(self, window: Window, num_heads: int) -> Tensor:
        """Number the (B, K, T) vectors of a window in a layer's cache seen as (B K C, W): (B K T,)."""
        if num_heads not in window.indices:
            window.indices[num_heads] = self._flat(window.slots, num_heads)
        return window.indices[num_heads]

    def _flat(self, slots: Tensor, num_heads: int) -> Tensor:
        if num_heads not in self._starts:
            heads = torch.arange(num_heads, device=slots.device)
            self._starts[num_heads] = (num_heads * self.row_starts + self.capacity * heads)[:, :, None]
        return (self._starts[num_heads] + slots[:, None]).flatten()

    def allocate(self, like: Tensor) -> Tensor:
        """Hold as many slots as there are for keys or values: (B, K, T, W) -> (B, K, C, W)."""
        return like.new_zeros(*like.shape[:2], self.capacity, like.shape[3])

    def geometry(self, window: Window, offset: int) -> Geometry:
        """What the layers of an offset (or `TRUNK`) are run with in a window: their own past."""
        layers = self._stacks.setdefault(offset, {})
        return window.geometry.with_past(StackPast(layers, self, window))

    def move(self, offsets: Collection[int], source: Tensor, target: Tensor) -> None:
        """Copy slots of some stacks to others: (B, P) from each to each."""
        for kept in (kept for offset in (TRUNK, *offsets) for pair in self._stacks[offset].values() for kept in pair):
            flat = kept.view(-1, kept.shape[-1])
            flat[self._flat(target, kept.shape[1])] = flat[self._flat(source, kept.shape[1])]

    def stored(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield offset, keys and values of every layer, each (B, K, C, W)."""
        for offset, layers in self._stacks.items():
            yield from ((offset, keys, values) for keys, values in layers.values())


def has_layers(model: MtpModel, offset: int) -> bool:
    """Tell whether layers with attention compute an offset."""
    return any(layers_of(owner) for owner in model.heads.modules_of(offset))
