"""Prepare one rank's share of a global batch: targets, weights of the offsets, counts, micro-batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_lightning.losses.distillation import teacher_positions
from mtp_lightning.losses.targets import IGNORE, count_targets, shifted_targets
from mtp_lightning.losses.weights import offset_weights
from mtp_lightning.model.draft_vocabulary import draft_vocabulary_of
from mtp_lightning.model.sequence_parallel import SequenceSlice
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.trainable import first_offset_with_loss

Batch = dict[str, Tensor]


class MicroBatch(NamedTuple):
    """Sequences that go through the model together.

    Where windows are cut over ranks, tokens are those of this rank's slice, of T positions, and targets have `IGNORE`
    at up to n-1 positions behind it (see `SequenceSlice.num_ahead`); documents and starts are of the whole windows.
    """

    tokens: Tensor  # (B, T+n)
    documents: Tensor  # (B, T+n)
    targets: Tensor  # (N, B, T)
    starts: Tensor | None = None  # (B, M) where documents begin, to attend to them one by one
    sources: Tensor | None = None  # (B,) which source of a mixture a held-out sequence comes from
    sequence: SequenceSlice | None = None


class BatchCounts(NamedTuple):
    """Denominators of the losses, as integers on the device: those of one rank's sequences, or of all ranks'."""

    targets: Tensor  # (N,) valid targets of each offset that it scores
    teachers: Tensor  # (N,) positions of each offset that have a teacher
    ordered: Tensor  # 0-dimensional: positions that have a token-order target


@dataclass(frozen=True)
class PreparedBatch:
    """One rank's sequences of a global batch; nothing in it depends on other ranks."""

    targets: Tensor  # (N, B, T) of whole windows
    weights: list[float]  # of each offset's loss in this step; 0 where it has none
    counts: BatchCounts  # of this rank's sequences, or of its slice of them
    micro_batches: list[MicroBatch]  # views of the batch


def prepare_batch(
    batch: Batch, recipe: Recipe, step: int | None, sequence: SequenceSlice | None = None
) -> PreparedBatch:
    """Shift the targets, weigh the offsets, count, and cut into micro-batches; no communication, no host wait.

    Args:
        batch: `tokens` and `documents`, both (B, T+n); `loss_mask`, (B, T+n), `starts`, (B, M), and `sources`, (B,),
            where there are.
        recipe: says how many offsets, which weights, and how many sequences a micro-batch has.
        step: 0-based number of the optimizer step; None for held-out sequences, of which every offset weighs 1.
        sequence: this rank's slice, where windows are cut over ranks: after the targets have been shifted.
    """
    tokens, documents, num_offsets = batch["tokens"], batch["documents"], recipe.heads.num_offsets
    targets = shifted_targets(tokens, documents, num_offsets, batch.get("loss_mask"))
    num_positions = targets.shape[2]
    is_ordered = documents[:, :num_positions] == documents[:, 1 : num_positions + 1]
    own = targets
    if sequence is not None:
        batch, own = _slice_of(batch, targets, sequence)
    counts = BatchCounts(count_scored(own, recipe), teacher_positions(own).sum((1, 2)), is_ordered.sum())
    weights = [1.0] * num_offsets if step is None else weights_at(recipe, step)
    micro_batches = list(_micro_batches(batch, own, recipe.batch.micro_batch_size, sequence))
    return PreparedBatch(targets, weights, counts, micro_batches)


def _slice_of(batch: Batch, targets: Tensor, sequence: SequenceSlice) -> tuple[Batch, Tensor]:
    """Cut tokens and targets of whole windows to this rank's slice, as a `MicroBatch` has them."""
    num_offsets, _, num_positions = targets.shape
    own = sequence.of(num_positions)
    reach = own.stop + sequence.num_ahead(num_offsets)
    targets = targets[..., own.start : reach].clone()
    targets[..., own.stop - own.start :] = IGNORE
    return batch | {"tokens": batch["tokens"][:, own.start : own.stop + num_offsets]}, targets


def count_scored(targets: Tensor, recipe: Recipe) -> Tensor:
    """Count the targets of every offset, (N, B, T) -> (N,): beyond the first, those in the draft vocabulary."""
    counts, drafts = count_targets(targets), draft_vocabulary_of(recipe)
    if drafts is not None:
        counts[1:] -= drafts.lacks(targets[1:]).sum((1, 2))
    return counts


def weights_at(recipe: Recipe, step: int) -> list[float]:
    """Weight of each offset's loss at a step; 0 for frozen heads whose loss has no gradient.

    >>> weights_at(Recipe.model_validate({"freeze": ["offsets_below_3"]}), 0)
    [0.0, 0.0, 1.0, 1.0]
    """
    weights = offset_weights(recipe.objective.weights, recipe.heads.num_offsets, step, recipe.run.steps)
    num_without = first_offset_with_loss(recipe) - 1
    return [0.0] * num_without + weights[num_without:]


def filled(values: Sequence[float], like: Tensor) -> Tensor:
    """Put numbers of the host where a tensor is, in its type, (N,): by kernels that are told them, not by a copy.

    A copy from the host would wait for all that the device has still to do.
    """
    return torch.stack([like.new_full((), value) for value in values])


def _micro_batches(batch: Batch, targets: Tensor, size: int, sequence: SequenceSlice | None) -> Iterator[MicroBatch]:
    for start in range(0, len(batch["tokens"]), size):
        rows = slice(start, start + size)
        starts, sources = (batch[name][rows] if name in batch else None for name in ("starts", "sources"))
        tokens, documents = batch["tokens"][rows], batch["documents"][rows]
        yield MicroBatch(tokens, documents, targets[:, rows], starts, sources, sequence)
