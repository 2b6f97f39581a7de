"""Stored tensors of others, read a block at a time."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mtp_lightning.checkpoint.format.tensors import BLOCK_BYTES, read_into
from mtp_lightning.checkpoint.huggingface.folder import Foreign


def read_blocks(foreign: Foreign, name: str) -> Iterator[tuple[int, Tensor]]:
    """Read a stored tensor in consecutive flat blocks of at most 4 MiB; yields each with its first value."""
    entry = foreign.entries[name]
    numel, length = math.prod(entry.shape), BLOCK_BYTES // entry.dtype.itemsize
    for start in range(0, numel, length):
        yield start, _read(foreign, name, start, min(length, numel - start))


def read_whole(foreign: Foreign, name: str) -> Tensor:
    """Read a stored tensor into memory."""
    shape = foreign.entries[name].shape
    return _read(foreign, name, 0, math.prod(shape)).view(shape)


def is_same(foreign: Foreign, name: str, other: str) -> bool:
    """Compare two stored tensors, bit for bit."""
    if other not in foreign.entries or foreign.entries[name][:2] != foreign.entries[other][:2]:
        return False
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for (_, a), (_, b) in zip(read_blocks(foreign, name), read_blocks(foreign, other), strict=True)
    )


def _read(foreign: Foreign, name: str, start: int, length: int) -> Tensor:
    entry = foreign.entries[name]
    values = torch.empty(length, dtype=entry.dtype)
    with foreign.files[name].open("rb") as file:
        read_into(values, file, entry.begin + start * entry.dtype.itemsize)
    return values
