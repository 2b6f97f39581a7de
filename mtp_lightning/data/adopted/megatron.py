"""Megatron's indexed data sets: tokens in NAME.bin, where sequences and documents lie in them in NAME.idx.

9 bytes b"MMIDIDX\\0\\0" · version, 8 bytes · type of the tokens, 1 · number of sequences S, 8 · of documents + 1, 8 ·
lengths, S x int32 · places in bytes, S x int64 · first sequence of each document, and S, int64 · all little-endian
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import final

import numpy as np

from mtp_lightning.data.adopted.token_file import Integers, Run, TokenFile, Words, check_type, wrong_file

MAGIC, OLD_MAGIC = b"MMIDIDX\0\0", b"TNTIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
BLOCK_DOCUMENTS = 1 << 20


def megatron_files(path: Path) -> Iterator[TokenFile]:
    """Yield the file of an index, NAME.idx.

    Raises:
        DataError: The index is none, or is of other tokens.
    """
    tokens = path.with_suffix(".bin")
    if not tokens.is_file():
        raise wrong_file(f"the tokens of {path} must be in {tokens.name} beside it", "no such file")
    index = _Index(path, tokens)
    yield TokenFile(
        path=tokens,
        dtype=index.dtype,
        begin_bytes=0,
        num_tokens=tokens.stat().st_size // index.dtype.itemsize,
        runs=index.runs,
        index=path,
    )


@final
class _Index:
    def __init__(self, path: Path, tokens: Path) -> None:
        self.path = path
        self._tokens = tokens
        with path.open("rb") as file:
            head = file.read(HEADER.size)
        self._check_magic(head)
        _, version, code, num_sequences, num_bounds = HEADER.unpack(head)
        if version != 1:
            raise wrong_file(f"{path} must have version 1 of Megatron's index", f"version {version:,}")
        self.dtype = check_type(path, np.dtype(TYPES[code]) if code in TYPES else None, f"type {code}")
        self._check_size(num_sequences, num_bounds)
        content = np.memmap(path, mode="r", dtype=np.uint8)[HEADER.size :]
        self._lengths = content[: 4 * num_sequences].view("<i4")
        self._places = content[4 * num_sequences : 12 * num_sequences].view("<i8")
        self._bounds = content[12 * num_sequences :].view("<i8")
        if self._bounds[0] != 0 or self._bounds[-1] != num_sequences:
            found = f"{self._bounds[0]:,} to {self._bounds[-1]:,}"
            raise wrong_file(f"the documents of {path} must span its {num_sequences:,} sequences, 0 to the last", found)

    def runs(self, words: Words) -> Iterator[Run]:
        """Yield the documents, as they lie in the file of tokens."""
        for at in range(0, self._bounds.size - 1, BLOCK_DOCUMENTS):
            bounds = np.asarray(self._bounds[at : at + BLOCK_DOCUMENTS + 1])
            if (np.diff(bounds) < 0).any() or bounds[0] < 0 or bounds[-1] > self._lengths.size:
                raise self._wrong("documents must begin one after another", f"others from document {at:,} on")
            yield from self._runs_of(bounds, words.size)

    def _runs_of(self, bounds: Integers, num_tokens: int) -> Iterator[Run]:
        first, last = int(bounds[0]), int(bounds[-1])
        lengths = self._lengths[first:last].astype(np.int64)
        starts, phases = np.divmod(self._places[first:last], self.dtype.itemsize)
        is_wrong = (lengths < 0) | (phases != 0) | (starts < 0) | (starts > num_tokens - lengths)
        if is_wrong.any():
            at = int(np.argmax(is_wrong))
            found = f"{lengths[at]:,} tokens from byte {self._places[first + at]:,} on, sequence {first + at:,}"
            raise self._wrong(f"sequences must lie within the {num_tokens:,} tokens of {self._tokens.name}", found)
        ends = np.concatenate([[0], np.cumsum(lengths)])
        sizes = ends[bounds[1:] - first] - ends[bounds[:-1] - first]  # of documents
        is_full = lengths > 0
        starts, lengths, sizes = starts[is_full], lengths[is_full], sizes[sizes > 0]
        jumps = np.ones(starts.size, dtype=np.bool_)  # whether a sequence lies elsewhere than after the one before it
        jumps[1:] = starts[1:] != starts[:-1] + lengths[:-1]
        begins = np.searchsorted(np.cumsum(lengths), np.cumsum(sizes) - sizes, side="right")  # first sequence of each
        inside = np.ones(starts.size, dtype=np.bool_)
        inside[begins] = False
        if (jumps & inside).any():
            found = f"a gap before byte {starts[np.argmax(jumps & inside)] * self.dtype.itemsize:,}"
            raise self._wrong("the sequences of a document must lie one after another", found)
        cuts = np.flatnonzero(jumps[begins])
        for begin, end in zip(cuts.tolist(), [*cuts[1:].tolist(), sizes.size], strict=True):
            yield Run(int(starts[begins[begin]]), sizes[begin:end])

    def _check_magic(self, head: bytes) -> None:
        expected = f"{self.path} must begin as Megatron's index, {MAGIC!r}, in {HEADER.size} bytes or more"
        if head.startswith(OLD_MAGIC):
            hint = "Write it again with --dataset-impl mmap of Megatron's preprocess_data.py"
            raise wrong_file(expected, f"{OLD_MAGIC!r}, the older format that is not mapped", hint)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise wrong_file(expected, f"{len(head)} bytes, {head[: len(MAGIC)]!r}")

    def _check_size(self, num_sequences: int, num_bounds: int) -> None:
        num_bytes = self.path.stat().st_size
        wanted = HEADER.size + 12 * num_sequences + 8 * num_bounds
        if num_bytes == wanted + num_sequences and num_sequences:
            found = "a mode for each sequence: text mixed with images"
        elif num_bytes != wanted or num_bounds < 1:
            found = f"{num_bytes:,} bytes"
        else:
            return
        raise wrong_file(
            f"{self.path} must have {wanted:,} bytes: {num_sequences:,} sequences, {num_bounds - 1:,} documents",
            found,
        )

    def _wrong(self, expected: str, found: str) -> Exception:
        return wrong_file(f"{self.path}: {expected}", found)
