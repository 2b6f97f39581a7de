"""The tokenizer of a folder, carried along."""

import shutil
from pathlib import Path

from mtp_lightning.checkpoint.convert.consolidate import CARRIED
from mtp_lightning.data.tokenizers.open import open_tokenizer
from mtp_lightning.errors import CheckpointError

TOKENIZERS, BESIDE = CARRIED[:2], CARRIED[2:]


def find_tokenizer(folder: Path) -> Path | None:
    """Find the tokenizer of a folder."""
    return next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None)


def end_of_document(path: Path, vocab_size: int, given: int | None) -> int:
    """Open a tokenizer and return the id that ends a document.

    Raises:
        CheckpointError: It has ids for which the embedding has no row.
        DataError: It cannot be read, or the end is in doubt.
    """
    tokenizer = open_tokenizer(str(path), end_of_document=given)
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            "the embedding must have a row for every id of the tokenizer",
            f"{tokenizer.vocab_size:,} ids in {path} and {vocab_size:,} rows",
            "Take tokenizer and weights from the same model; tokens that were added later have no weights",
        )
    return tokenizer.end_of_document


def carry_tokenizer(path: Path, folder: Path) -> list[str]:
    """Copy a tokenizer and the small files beside it into a folder; return the names."""
    files = [path, *(path.with_name(name) for name in BESIDE)]
    carried = [file for file in files if file.is_file()]
    for file in carried:
        shutil.copyfile(file, folder / file.name)
    return [file.name for file in carried]
