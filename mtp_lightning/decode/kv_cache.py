"""Keys and values of committed positions, preallocated: a slot per position, a length per row, no compaction.

A pass writes the slots of its window and attends to all slots up to each query's own. What lies behind a row's
length is stale: the next window overwrites it before anything attends to it, so rolling back is setting `lengths`.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from mtp_lightning.model.heads import TRUNK
from mtp_lightning.model.layers import Attention
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.model.positions import AttentionInputs, KVCache, rotary_tables

Layers = dict[object, tuple[Tensor, Tensor]]


@final
class StackPast(KVCache):
    """The keys and values of one stack of layers, as one window sees them."""

    def __init__(self, layers: Layers, index: Tensor, reach: int) -> None:
        self.layers = layers
        self.index = index
        self.reach = reach

    def extend(self, layer: object, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the window's slots and return all up to its last: two (B, K, T, W) -> two (B, K, S, W)."""
        keys, values = self.layers[layer]
        for kept, new in ((keys, key), (values, value)):
            kept.view(-1, kept.shape[-1]).index_copy_(0, self.index, new.reshape(-1, kept.shape[-1]))
        return keys[:, :, : self.reach], values[:, :, : self.reach]


@final
@dataclass(frozen=True)
class Window:
    """The positions that one pass computes, a slot of the cache for each."""

    slots: Tensor  # (B, T) where keys and values go
    geometry: AttentionInputs  # without a past
    index: Tensor  # (B K T,) rows of a cache of shape (B K C, W)
    reach: int  # S, one more than the last slot


@final
class Cache:
    """Keys and values (B, K, C, W) of every layer of trunk and chosen heads; `lengths` of the trunk's rows.

    An offset that shares its module with another (kind `recursive`) has keys and values of its own, as in training.
    The last slot takes what falls behind the end, and is never attended to.
    """

    def __init__(self, model: MtpModel, offsets: Collection[int], num_rows: int, capacity: int) -> None:
        weight, section = model.trunk.embed_tokens.weight, model.section
        self.capacity = capacity
        self.lengths = torch.zeros(num_rows, dtype=torch.long, device=weight.device)  # (B,)
        self.row_starts = capacity * torch.arange(num_rows, device=weight.device)[:, None]  # (B, 1)
        self._num_heads = section.resolved_key_value_heads
        self._heads = torch.arange(self._num_heads, device=weight.device)  # (K,)
        shape = (num_rows, self._num_heads, capacity, section.resolved_head_dim)
        self._stacks: dict[int, Layers] = {
            offset: {layer: (weight.new_zeros(shape), weight.new_zeros(shape)) for layer in attentions(model, offset)}
            for offset in (TRUNK, *offsets)
        }
        self._slots = torch.arange(capacity, device=weight.device)  # (C,)
        positions = self._slots[None]
        cos, sin = rotary_tables(positions, section, like=weight)
        self._cos, self._sin = cos[0, 0], sin[0, 0]  # (C, R)

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
        else:
            mask = (self._slots[:reach] <= slots[:, :, None])[:, None]  # (B, 1, T, S)
        return self._window(slots, slots, mask, reach)

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
        return self._window(slots, self.lengths[:, None] + depths, seen[:, None], reach)

    def _window(self, slots: Tensor, positions: Tensor, mask: Tensor | None, reach: int) -> Window:
        geometry = AttentionInputs(self._cos[positions][:, None], self._sin[positions][:, None], mask)
        return Window(slots, geometry, self._flat(slots), reach)

    def _flat(self, slots: Tensor) -> Tensor:
        """Number the (B, K, T) vectors of some slots in a cache seen as (B K C, W)."""
        starts = self._num_heads * self.row_starts + self.capacity * self._heads  # (B, K)
        return (starts[:, :, None] + slots[:, None]).flatten()

    def geometry(self, window: Window, offset: int) -> AttentionInputs:
        """What the layers of an offset (or `TRUNK`) are run with in a window: their own past."""
        return window.geometry._replace(past=StackPast(self._stacks[offset], window.index, window.reach))

    def move(self, offsets: Collection[int], source: Tensor, target: Tensor) -> None:
        """Copy slots of some stacks to others: (B, P) from each to each."""
        index, new_index = self._flat(source), self._flat(target)
        for offset in (TRUNK, *offsets):
            for kept in (tensor for pair in self._stacks[offset].values() for tensor in pair):
                flat = kept.view(-1, kept.shape[-1])
                flat[new_index] = flat[index]

    def stored(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield offset, keys and values of every layer, each (B, K, C, W)."""
        for offset, layers in self._stacks.items():
            yield from ((offset, keys, values) for keys, values in layers.values())


def attentions(model: MtpModel, offset: int) -> list[Attention]:
    """List the attention layers that an offset (or `TRUNK`) consists of."""
    owners: list[nn.Module] = [model.trunk] if offset == TRUNK else [*model.heads.modules_of(offset)]
    return [module for owner in owners for module in owner.modules() if isinstance(module, Attention)]
