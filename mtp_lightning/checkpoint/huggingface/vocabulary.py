"""More rows in a vocabulary than a folder stores, for tokens that were added to its tokenizer."""

from dataclasses import replace
from typing import Literal

from mtp_lightning.checkpoint.huggingface.configs import MOST
from mtp_lightning.checkpoint.huggingface.folder import HFCheckpoint, changed
from mtp_lightning.errors import CheckpointError

MULTIPLE = 64
"""What a number of rows is rounded up to, so that matrix products of the vocabulary are fast."""


def with_rows(hf_checkpoint: HFCheckpoint, wanted: int | Literal["auto"], num_ids: int) -> HFCheckpoint:
    """Give embedding and unembedding more rows, each the mean of those that are stored.

    transformers (`mean_resizing`) draws the new rows around that mean, with a variance of 1e-9 of the rows' own.

    Args:
        hf_checkpoint: the folder.
        wanted: number of rows; `auto` means one for every id of the tokenizer and for every row that is stored, rounded
            up to a multiple of 64.
        num_ids: number of ids that the tokenizer has; 0 without one.

    Raises:
        CheckpointError: there would be fewer rows than are stored, fewer than ids, or more than any model has.
    """
    stored = hf_checkpoint.section.vocab_size
    rows = -(-max(stored, num_ids) // MULTIPLE) * MULTIPLE if wanted == "auto" else wanted
    if not max(stored, num_ids) <= rows <= MOST:
        raise CheckpointError(
            "--resize-vocabulary must leave every row that is stored, and give one to every id of the tokenizer",
            f"{rows:,} rows wanted, {stored:,} stored, {num_ids:,} ids, in {hf_checkpoint.path}",
            f"Give a number from {max(stored, num_ids):,}, or auto",
        )
    names = [name for name in hf_checkpoint.vocabulary if name in hf_checkpoint.entries]
    entries, new_rows = dict(hf_checkpoint.entries), {}
    for name in names:
        entry = entries[name]
        if entry.shape[:1] == (stored,) and rows > stored:  # another shape is told of with all others
            entries[name], new_rows[name] = entry._replace(shape=(rows, *entry.shape[1:])), rows - stored
    note = f"{rows:,} rows for tokens in place of {stored:,}; the new ones are the mean of the others"
    return replace(
        hf_checkpoint,
        section=changed(hf_checkpoint.section, vocab_size=rows),
        entries=entries,
        new_rows=new_rows,
        notes=(*hf_checkpoint.notes, *([note] if new_rows else [])),
    )
