"""Parameters cut into the pieces of several ranks."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from mtp_lightning.checkpoint.format.write_shards import Piece, write_pieces

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = 3.0


def moment_of(weight: Tensor, kind: str) -> Tensor:
    """Make a moment that differs from the weight and from the other moment."""
    return weight.float() * (2 + MOMENTS.index(kind)) + 1


def piece(name: str, weight: Tensor, start: int = 0, stop: int | None = None, *, frozen: bool = False) -> Piece:
    """Cut an interval out of a parameter."""
    flat = weight.detach().reshape(-1)
    moments = {} if frozen else {kind: moment_of(flat[start:stop], kind) for kind in MOMENTS}
    return Piece(name, tuple(weight.shape), start, flat[start:stop], moments, None if frozen else STEP)


def cut(
    parameters: Mapping[str, Tensor], bounds: Sequence[int], frozen: frozenset[str] = frozenset()
) -> list[list[Piece]]:
    """Cut parameters, laid end to end as ZeRO does, at the bounds: one list of pieces for each of the ranks."""
    total = sum(parameter.numel() for parameter in parameters.values())
    pieces_of_ranks = []
    for first, last in pairwise([0, *sorted(bounds), total]):
        position, pieces = 0, []
        for name, parameter in parameters.items():
            start, stop = (min(max(bound - position, 0), parameter.numel()) for bound in (first, last))
            pieces.append(piece(name, parameter, start, stop, frozen=name in frozen))  # many are empty
            position += parameter.numel()
        pieces_of_ranks.append(pieces)
    return pieces_of_ranks


def evenly(parameters: Mapping[str, Tensor], num_ranks: int) -> list[list[Piece]]:
    """Cut parameters into equal shares."""
    total = sum(parameter.numel() for parameter in parameters.values())
    return cut(parameters, [total * rank // num_ranks for rank in range(1, num_ranks)])


def write_ranks(folder: Path, pieces_of_ranks: Sequence[Sequence[Piece]]) -> Path:
    """Write the shards of all ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, pieces in enumerate(pieces_of_ranks):
        write_pieces(folder, iter(pieces), rank, len(pieces_of_ranks))
    return folder


def is_equal(found: Tensor, expected: Tensor) -> bool:
    """Equality to the bit, of type and shape too."""
    same_form = found.dtype == expected.dtype and found.shape == expected.shape
    return same_form and torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
