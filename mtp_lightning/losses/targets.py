"""Targets of every offset: shifted, bounded by the document, masked where the data says so."""

import torch
from torch import Tensor

IGNORE = -100  # target of a position that does not count, as in torch's cross-entropy


def shifted_targets(tokens: Tensor, documents: Tensor, num_offsets: int, loss_mask: Tensor | None = None) -> Tensor:
    """Shift a batch of rows by every offset.

    The target of offset k at position t is token t+k, if it lies in the document of position t and the loss mask
    (true where a token may be a target) allows it; `IGNORE` otherwise.

    Args:
        tokens: (B, T+n) token ids.
        documents: (B, T+n) number of the document each token belongs to.
        num_offsets: Number n of offsets.
        loss_mask: (B, T+n), or None when every token may be a target.

    Returns:
        (N, B, T) targets, offset 1 first.
    """
    num_positions = tokens.shape[1] - num_offsets
    here = documents[:, :num_positions]
    shifted = []
    for offset in range(1, num_offsets + 1):
        there = slice(offset, offset + num_positions)
        counts = documents[:, there] == here
        if loss_mask is not None:
            counts &= loss_mask[:, there]
        shifted.append(torch.where(counts, tokens[:, there], IGNORE))
    return torch.stack(shifted)  # (N, B, T)


def count_targets(targets: Tensor) -> Tensor:
    """Count the valid targets of every offset: (N, B, T) -> (N,)."""
    return (targets != IGNORE).sum((1, 2))


def oracle_targets(
    tokens: list[int], documents: list[int], num_offsets: int, loss_mask: list[bool] | None = None
) -> list[list[int]]:
    """Define the targets of one row, slowly: entry [k-1][t] is the target of offset k at position t."""
    targets = []
    for offset in range(1, num_offsets + 1):
        row = []
        for position in range(len(tokens) - num_offsets):
            is_target = documents[position] == documents[position + offset]
            if loss_mask is not None and not loss_mask[position + offset]:
                is_target = False
            row.append(tokens[position + offset] if is_target else IGNORE)
        targets.append(row)
    return targets
