"""Sequence parallelism as in DeepSpeed Ulysses: a group of ranks computes the same windows [arXiv 2309.14509].

Each rank has a contiguous slice of a window's positions, of every layer and every loss. Only attention mixes positions:
there the ranks exchange slices of all heads for all positions of some heads, and back. Gradients go the same way back,
so that the sum over all ranks is that of the whole windows.
"""

import math
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor


@final
class SequenceSlice:
    """This rank's slice of the windows that its group computes: of N equal ones, in the order of ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Take the group whose ranks read the same rows."""
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def close(self) -> None:
        """Let go of the group; all of its ranks call it."""
        dist.destroy_process_group(self._group)

    def of(self, num_positions: int) -> slice:
        """Positions of a window of T that are this rank's."""
        length = num_positions // self.size
        return slice(self.rank * length, (self.rank + 1) * length)

    def num_ahead(self, num_offsets: int) -> int:
        """Positions after the slice, n-1, at which the main head says what the slice's offsets are compared with.

        There are none after the last slice.
        """
        return 0 if self.rank == self.size - 1 else num_offsets - 1

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exchange positions for heads: (B, H, T/N, W), two (B, K, T/N, W) -> (B, H/N, T, W), two (B, K', T, W).

        Where N does not divide K, keys and values are repeated until it does: a rank needs those its queries meet.
        """
        times = self.size // math.gcd(self.size, key.shape[1])
        parts = (query, key.repeat_interleave(times, 1), value.repeat_interleave(times, 1))
        by_rank = [torch.unflatten(part, 1, (self.size, -1)) for part in parts]  # (B, N, H/N, T/N, W)
        num_heads = [part.shape[2] for part in by_rank]
        exchanged = self._exchange(torch.cat(by_rank, 2).transpose(0, 1))  # (N, B, heads, T/N, W)
        query, key, value = torch.split(exchanged.permute(1, 2, 0, 3, 4).flatten(2, 3), num_heads, 1)
        return query, key, value

    def to_positions(self, mixed: Tensor) -> Tensor:
        """Exchange heads for positions, the way back: (B, H/N, T, W) -> (B, H, T/N, W)."""
        by_rank = torch.unflatten(mixed, 2, (self.size, -1)).permute(2, 0, 1, 3, 4)  # (N, B, H/N, T/N, W)
        return self._exchange(by_rank).transpose(0, 1).flatten(1, 2)

    def ahead(self, states: Tensor, num_offsets: int) -> Tensor:
        """Fetch the states of the `num_ahead` positions after the slice: (B, T/N, D) -> (B, n-1, D) or (B, 0, D)."""
        batch, _, width = states.shape
        sent = states[:, : num_offsets - 1] if self.rank else states[:, :0]
        there = self.num_ahead(num_offsets)
        sizes_in, sizes_out = [0] * self.size, [0] * self.size
        if self.rank:
            sizes_in[self.rank - 1] = sent.numel()
        if there:
            sizes_out[self.rank + 1] = batch * there * width
        received = self._exchange(sent.flatten(), sizes_out, sizes_in)
        return received.view(batch, there, width)

    def _exchange(self, parts: Tensor, sizes_out: list[int] | None = None, sizes_in: list[int] | None = None) -> Tensor:
        """Give each rank its part of the first dimension, and take this rank's of each."""
        sent = all_to_all_single_autograd(parts.contiguous(), sizes_out, sizes_in, self._group)
        received: Tensor = wait_tensor(sent)  # type: ignore[no-untyped-call]
        return received


def slice_of_this_rank(num_slices: int) -> SequenceSlice | None:
    """Group every N consecutive ranks; all ranks call it. None for windows that are not cut."""
    if num_slices == 1:
        return None
    return SequenceSlice(dist.new_subgroups(num_slices)[0])  # type: ignore[no-untyped-call]


def own_positions(per_position: Tensor, sequence: SequenceSlice | None) -> Tensor:
    """Cut what there is of each position to this rank's: (..., T) -> (..., T/N)."""
    return per_position if sequence is None else per_position[..., sequence.of(per_position.shape[-1])]
