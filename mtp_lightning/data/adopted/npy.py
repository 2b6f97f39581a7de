"""Files of token ids and nothing else, as OLMo and Dolma write them (.npy without a header), or real .npy files."""

import csv
import gzip
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mtp_lightning.data.adopted.token_file import Run, Runs, TokenFile, Words, check_type, whole_tokens, wrong_file
from mtp_lightning.data.shards.arrays import header_of

MAGIC = b"\x93NUMPY"
MOST_HEADER_BYTES = 1 << 16
BLOCK_LINES = 1 << 20


def npy_files(path: Path, *, dtype: str | None, vocab_size: int) -> Iterator[TokenFile]:
    """Yield a file of tokens; without a header, of the type that is given, else the one that OLMo takes.

    Raises:
        DataError: It holds something else.
    """
    with path.open("rb") as file:
        head = file.read(MOST_HEADER_BYTES)
    num_bytes = path.stat().st_size
    if head.startswith(MAGIC):
        stored, begin_bytes, num_tokens = _header_of(path, head)
        if num_bytes - begin_bytes != num_tokens * stored.itemsize:
            expected = f"{path} must have the {num_tokens:,} numbers of {stored} of its header"
            raise wrong_file(expected, f"{num_bytes - begin_bytes:,} bytes of them")
    else:
        stored, begin_bytes = np.dtype(dtype or ("<u2" if vocab_size <= 1 << 16 else "<u4")).newbyteorder("<"), 0
        num_tokens = whole_tokens(path, num_bytes, stored)
        if dtype is None and stored.itemsize == 2:
            _refuse_wider(path, head)
    metadata = path.with_suffix(".csv.gz")
    yield TokenFile(
        path=path,
        dtype=stored,
        begin_bytes=begin_bytes,
        num_tokens=num_tokens,
        runs=_runs_of(metadata),
        index=metadata if metadata.is_file() else None,
    )


def _header_of(path: Path, head: bytes) -> tuple[np.dtype[Any], int, int]:
    """Return type, first byte and number of the tokens of a .npy file; those of several dimensions lie row by row."""
    try:
        shape, in_columns, dtype, begin = header_of(head)
    except ValueError as error:
        raise wrong_file(f"{path} must have a header of numpy", str(error)) from error
    if in_columns and len(shape) > 1:
        hint = "Save it again in C order: np.save(path, np.ascontiguousarray(tokens))"
        raise wrong_file(f"the tokens of {path} must lie row by row", "columns one after another", hint)
    if min(shape, default=0) < 0:
        raise wrong_file(f"{path} must have a header of numpy", f"shape {shape}")
    return check_type(path, dtype, f"{dtype}"), begin, math.prod(shape)


def _refuse_wider(path: Path, head: bytes) -> None:
    """Refuse 4-byte ids that would pass for twice as many of 2 bytes, every second of them 0."""
    words = np.frombuffer(head[: len(head) // 4 * 4], dtype="<u2")
    if words.size >= 128 and not words[1::2].any() and words.any():
        raise wrong_file(
            f"the tokens of {path} must have the type that goes with the vocabulary, 2 bytes each",
            "0 for every second one, as of numbers of 4 bytes",
            "Name their type: --dtype uint32 (--dtype uint16 if they are so)",
        )


def _runs_of(metadata: Path) -> Runs:
    """Return what finds the documents that Dolma lists in NAME.csv.gz: begin, end, and what it knows of them."""

    def runs(words: Words) -> Iterator[Run]:
        wanted = f"the documents of {metadata.with_suffix('').with_suffix('.npy').name} must be listed in {metadata}"
        try:
            with gzip.open(metadata, "rt", encoding="utf-8", newline="") as file:
                yield from _blocks(csv.reader(file), words.size)
        except (OSError, EOFError, ValueError, IndexError, csv.Error, zlib.error) as error:
            hint = "Restore it, or find documents by the token that ends them: --documents eos"
            raise wrong_file(f"{wanted}: first and last token of each, in order", str(error), hint) from error

    return runs


def _blocks(lines: Any, num_tokens: int) -> Iterator[Run]:
    first = at = 0
    lengths: list[int] = []
    for line in lines:
        begin, end = int(line[0]), int(line[1])
        if begin < at or end <= begin or end > num_tokens:
            raise ValueError(f"tokens {begin:,} to {end:,} of {num_tokens:,}, after a document that ends at {at:,}")
        if (begin > at or len(lengths) == BLOCK_LINES) and lengths:
            yield Run(first, np.array(lengths))
            lengths = []
        first = first if lengths else begin
        lengths.append(end - begin)
        at = end
    if lengths:
        yield Run(first, np.array(lengths))
