"""A file of token ids that others wrote, and where its documents lie in it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mtp_lightning.errors import DataError

BLOCK_TOKENS = 1 << 22
Integers = NDArray[np.int64]
Words = NDArray[np.integer[Any]]
Boundary = Literal["eos", "bos"]


@dataclass(frozen=True)
class Run:
    """Documents that follow one another without a gap."""

    start: int  # number of the first token, counted from the first one of the file
    lengths: Integers  # in tokens; none is empty


Runs = Callable[[Words], Iterator[Run]]


@dataclass(frozen=True, kw_only=True)
class TokenFile:
    """A file whose tokens lie one after another, in one type of numpy."""

    path: Path
    dtype: np.dtype[Any]
    begin_bytes: int  # of the first token
    num_tokens: int
    runs: Runs  # the documents by the index that comes with the file
    index: Path | None = None  # the file with that index, if it is another

    def words(self) -> Words:
        """Return the tokens, mapped."""
        shape = (self.num_tokens,)
        return np.asarray(np.memmap(self.path, mode="r", dtype=self.dtype, offset=self.begin_bytes, shape=shape))


def runs_by_token(token: int, boundary: Boundary) -> Runs:
    """Return what finds documents that end with a token (eos) or begin with it (bos); the last may do without an end.

    >>> list(runs_by_token(0, "eos")(np.array([5, 0, 6, 7, 0, 8])))[0].lengths.tolist()
    [2, 3]
    """
    after = 1 if boundary == "eos" else 0

    def runs(words: Words) -> Iterator[Run]:
        start = 0
        for at in range(0, words.size, BLOCK_TOKENS):
            ends = np.flatnonzero(words[at : at + BLOCK_TOKENS] == token) + (at + after)
            ends = ends[ends > start]
            if ends.size:
                yield Run(start, np.diff(ends, prepend=start))
                start = int(ends[-1])
        if start < words.size:
            yield Run(start, np.array([words.size - start]))

    return runs


def check_type(path: Path, dtype: np.dtype[Any] | None, found: str) -> np.dtype[Any]:
    """Return the type of the tokens of a file.

    Raises:
        DataError: It is none of whole numbers; `found` names it.
    """
    if dtype is None or dtype.kind not in "iu":
        raise wrong_file(f"the tokens of {path} must be whole numbers of 1, 2, 4 or 8 bytes", found)
    return dtype if dtype.byteorder == ">" else dtype.newbyteorder("<")


def whole_tokens(path: Path, num_bytes: int, dtype: np.dtype[Any]) -> int:
    """Return how many tokens so many bytes of a file are.

    Raises:
        DataError: They are not a whole number of them.
    """
    if num_bytes % dtype.itemsize:
        raise wrong_file(
            f"the tokens of {path} must be whole numbers of {dtype.itemsize} bytes ({dtype.name})",
            f"{num_bytes:,} bytes",
            "Copy the file again from its source, or name the type of its tokens with --dtype",
        )
    return num_bytes // dtype.itemsize


def wrong_file(expected: str, found: str, hint: str = "") -> DataError:
    """Return the error of a file that is not what its format says."""
    return DataError(expected, found, hint or "Copy the folder again from its source, or write it again with its tool")
