"""How one stored tensor holds one or several of ours."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_lightning.recipe.schema.model import ModelSection


class Packing(NamedTuple):
    """Both ways between a stored tensor and the parts of it that are parameters of their own, in equal shapes."""

    num_parts: int
    split: Callable[[Tensor, ModelSection], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor], ModelSection], Tensor]

    def stored_shape(self, part: Sequence[int]) -> tuple[int, ...]:
        """Shape of the stored tensor, from that of one part."""
        return (self.num_parts * part[0], *part[1:])


class Cell(NamedTuple):
    """Where a parameter lies: in which stored tensor, and which part of it."""

    stored: str
    packing: Packing
    part: int = 0


def _split_heads(stored: Tensor, section: ModelSection) -> Sequence[Tensor]:
    by_head = stored.reshape(section.num_attention_heads, 3, section.resolved_head_dim, *stored.shape[1:])
    return [by_head[:, part].flatten(0, 1) for part in range(3)]


def _join_heads(parts: Sequence[Tensor], section: ModelSection) -> Tensor:
    form = (section.num_attention_heads, section.resolved_head_dim, *parts[0].shape[1:])
    return torch.stack([part.reshape(form) for part in parts], dim=1).flatten(0, 2)


def _to_halves(stored: Tensor, section: ModelSection) -> Sequence[Tensor]:
    by_pair = stored.reshape(-1, section.resolved_head_dim // 2, 2, *stored.shape[1:])
    return [by_pair.transpose(1, 2).flatten(0, 2)]


def _to_pairs(parts: Sequence[Tensor], section: ModelSection) -> Tensor:
    by_half = parts[0].reshape(-1, 2, section.resolved_head_dim // 2, *parts[0].shape[1:])
    return by_half.transpose(1, 2).flatten(0, 2)


def _swapped(stored: Tensor) -> Tensor:
    return torch.cat(stored.chunk(2, dim=1)[::-1], dim=1)


PLAIN = Packing(1, lambda stored, section: [stored], lambda parts, section: parts[0])
"""As it is."""
FUSED = Packing(3, _split_heads, _join_heads)
"""Query, key and value of one head after the other, in one matrix or bias [GPT-NeoX]."""
PAIRED = Packing(1, _to_halves, _to_pairs)
"""Queries or keys whose rotary positions turn neighbouring channels, not those half a head apart [Meta]."""
SWAPPED = Packing(1, lambda stored, section: [_swapped(stored)], lambda parts, section: _swapped(parts[0]))
"""A projection from 2D to D with its two inputs in the other order."""
