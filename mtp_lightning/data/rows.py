"""Rows: windows of consecutive tokens, addressed by number, read from mapped tar shards."""

from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from mtp_lightning.data.index import Index, load_index
from mtp_lightning.data.manifest import Manifest, Split, load_manifest
from mtp_lightning.errors import DataError

MOST_MAPPED_SHARDS = 256  # each keeps a file descriptor and the ends of its documents
Integers = NDArray[np.int64]


@final
class Rows:
    """The rows of one split: row i holds T + n consecutive tokens, and the next one begins T tokens later.

    Rows run across the members of a shard, not across shards. Row to bytes is arithmetic on the index, so any row is
    as near as any other; nothing is read before a row is asked for. Copies sent to other processes map anew.
    """

    def __init__(self, folder: Path, split: Split, *, window_tokens: int, num_offsets: int) -> None:
        """Open a shard folder and check that every shard file has its size.

        Raises:
            DataError: The folder is damaged, or no shard of the split is as long as one row.
        """
        self.folder = folder
        self.split = split
        self.manifest = load_manifest(folder)
        check_sizes(folder, self.manifest)
        self.width_tokens = window_tokens + num_offsets
        self._stride_tokens = window_tokens
        self._index = load_index(folder, self.manifest)
        self._numbers = [i for i, shard in enumerate(self.manifest.shards) if shard.split == split]
        shard_tokens = np.array([self.manifest.shards[i].num_tokens for i in self._numbers], dtype=np.int64)
        num_rows = np.maximum(0, (shard_tokens - self.width_tokens) // window_tokens + 1)
        self._first_rows = np.concatenate([[0], np.cumsum(num_rows)])
        self._is_masked = self.manifest.is_masked(split)
        self._mapped: dict[int, _MappedShard] = {}
        self._refuse_none(int(shard_tokens.max(initial=0)))

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._first_rows[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}

    def read(self, rows: Integers) -> dict[str, NDArray[Any]]:
        """Read rows as `tokens` and `documents`, both (B, T+n); documents are numbered 0, 1, 2, … within each row.

        Where the split has prompts there is a `loss_mask` too, true for tokens that may be targets.
        """
        places, starts = self._locate(rows)
        tokens = np.empty((rows.size, self.width_tokens), dtype=np.int64)  # (B, T+n)
        documents = np.empty_like(tokens)
        masks = np.empty(tokens.shape, dtype=np.bool_) if self._is_masked else None
        for place in np.unique(places):
            inside = np.flatnonzero(places == place)
            shard = self._map(int(place))
            tokens[inside] = shard.tokens(starts[inside])
            documents[inside] = shard.documents(starts[inside])
            if masks is not None:
                masks[inside] = shard.loss_mask(starts[inside])
        batch: dict[str, NDArray[Any]] = {"tokens": tokens, "documents": documents}
        return batch if masks is None else {**batch, "loss_mask": masks}

    def describe(self, row: int) -> str:
        """Return the place of a row in words: shard, member, first token in it."""
        places, starts = self._locate(np.array([row]))
        number = self._numbers[int(places[0])]
        return self._map(int(places[0])).describe(int(starts[0]), self.manifest.shards[number].name)

    def _locate(self, rows: Integers) -> tuple[Integers, Integers]:
        """Return for each row its shard (counted within the split) and its first token there."""
        if rows.size and (rows.min() < 0 or rows.max() >= len(self)):
            raise DataError(
                f"a row of {self.split} must be in [0, {len(self):,})",
                f"{rows.min()} to {rows.max()}" if rows.size > 1 else str(rows[0]),
                "Choose a row in the range",
            )
        places = np.searchsorted(self._first_rows, rows, side="right") - 1
        return places, (rows - self._first_rows[places]) * self._stride_tokens

    def _map(self, place: int) -> "_MappedShard":
        if place not in self._mapped:
            if len(self._mapped) >= MOST_MAPPED_SHARDS:
                del self._mapped[next(iter(self._mapped))]
            number = self._numbers[place]
            path = self.folder / self.manifest.shards[number].name
            dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
            self._mapped[place] = _MappedShard(path, dtype, self._index, number, self.width_tokens)
        return self._mapped[place]

    def _refuse_none(self, most_tokens: int) -> None:
        if len(self) == 0:
            raise DataError(
                f"a shard of {self.split} must have the T + n = {self.width_tokens} tokens of one row",
                f"{most_tokens} tokens in the longest of {len(self._numbers)} in {self.folder}",
                "Add documents, or lower data.window_tokens",
            )


@final
class _MappedShard:
    """One tar file in memory, seen as one array of token ids with the members' places in it."""

    def __init__(self, path: Path, dtype: np.dtype[Any], index: Index, number: int, width_tokens: int) -> None:
        inside = index.shard == number
        self._path = path
        self._width_tokens = width_tokens
        self._first_tokens = np.concatenate([[0], np.cumsum(index.num_tokens[inside])])
        # Payloads begin at multiples of 512 bytes, so the whole file may be seen as tokens.
        self._words_at = index.tokens_at[inside] // dtype.itemsize
        self._lengths_at = index.lengths_at[inside]
        self._num_documents = index.num_documents[inside]
        self._mask_at = index.mask_at[inside]
        self._words = np.asarray(np.memmap(path, dtype=dtype, mode="r"))
        self._windows = np.lib.stride_tricks.sliding_window_view(self._words, width_tokens)

    def tokens(self, starts: Integers) -> NDArray[Any]:
        """Return the windows that begin at those tokens of the shard."""
        member = np.searchsorted(self._first_tokens, starts, side="right") - 1
        fits = starts + self._width_tokens <= self._first_tokens[member + 1]
        at = self._words_at[member] + starts - self._first_tokens[member]
        windows = self._windows[np.where(fits, at, 0)]  # (B, T+n)
        for crossing in np.flatnonzero(~fits):
            windows[crossing] = self._across_members(starts[crossing])
        return windows

    def documents(self, starts: Integers) -> Integers:
        """Return for each token of those windows the number of its document within the window."""
        ends = self._document_ends
        first = np.searchsorted(ends, starts, side="right")
        last = np.searchsorted(ends, starts + self._width_tokens - 1, side="right")
        counts = last - first
        window = np.repeat(np.arange(starts.size), counts)
        skipped = np.cumsum(counts) - counts
        end = ends[np.arange(counts.sum()) - np.repeat(skipped - first, counts)]
        begins = np.zeros((starts.size, self._width_tokens), dtype=np.int64)  # (B, T+n)
        begins[window, end - starts[window]] = 1
        return np.cumsum(begins, axis=1)

    def loss_mask(self, starts: Integers) -> NDArray[np.bool_]:
        """Return for each token of those windows whether it may be a target."""
        positions = starts[:, None] + np.arange(self._width_tokens)  # (B, T+n)
        member = np.searchsorted(self._first_tokens, positions, side="right") - 1
        has_mask = self._mask_at[member] >= 0
        at = np.where(has_mask, self._mask_at[member] + positions - self._first_tokens[member], 0)
        return np.where(has_mask, self._words.view(np.uint8)[at] == 1, True)

    def describe(self, start: int, name: str) -> str:
        member = int(np.searchsorted(self._first_tokens, start, side="right")) - 1
        return f"{name}, member {member}, token {start - int(self._first_tokens[member]):,}"

    @cached_property
    def _document_ends(self) -> Integers:
        """Return for each document of the shard the token after its last one."""
        file = self._words.view(np.uint8)
        lengths = [
            file[at : at + 4 * count].view("<u4").astype(np.int64)
            for at, count in zip(self._lengths_at, self._num_documents, strict=True)
        ]
        return np.cumsum(np.concatenate(lengths))

    def _across_members(self, start: np.int64) -> NDArray[Any]:
        positions = start + np.arange(self._width_tokens)
        member = np.searchsorted(self._first_tokens, positions, side="right") - 1
        words: NDArray[Any] = self._words[self._words_at[member] + positions - self._first_tokens[member]]
        return words


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Check that every shard file is there and as long as it was written.

    Raises:
        DataError: One is not; a shard that was cut short is found here, before anything is read.
    """
    for shard in manifest.shards:
        path = folder / shard.name
        must_hold = f"shard {path} must have {shard.num_bytes:,} bytes, as its manifest says"
        remedy = "Copy the file again from its source, or build the shards again with `mtp data build`"
        if not path.is_file():
            raise DataError(must_hold, "no such file", remedy)
        if path.stat().st_size != shard.num_bytes:
            raise DataError(must_hold, f"{path.stat().st_size:,} bytes", remedy)
