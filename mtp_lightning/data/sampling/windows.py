"""Rows: windows of consecutive tokens, addressed by number, read from mapped tar shards."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from mtp_lightning.data.shards.cache import ShardCache
from mtp_lightning.data.shards.manifest import Manifest, Split
from mtp_lightning.data.shards.mapped import Integers, ShardMaps
from mtp_lightning.errors import DataError

RowArrays = dict[str, NDArray[Any]]


class SequenceSource(ABC):
    """Rows of T + n tokens of one split, addressed by number; any row is as near as any other."""

    split: Split
    width_tokens: int  # T + n
    source_names: tuple[str, ...] = ()  # of the sources that are mixed; none where there is one

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of rows."""

    @property
    @abstractmethod
    def manifests(self) -> list[Manifest]:
        """What the folders that rows come from hold."""

    @abstractmethod
    def read(self, rows: Integers) -> RowArrays:
        """Read rows as `tokens` and `documents`, both (B, T+n); documents are numbered 0, 1, 2, … within each row.

        Tokens have the type they are stored in, uint16 or uint32; documents are int32.
        Where some tokens may not be targets there is a `loss_mask` too, true for those that may.
        """

    def sources(self, rows: Integers) -> Integers:
        """Return for each row which of `source_names` it comes from, counted from 0."""
        return np.zeros_like(rows)

    def fetch_ahead(self, rows: Integers | None) -> None:
        """Begin to fetch the shards of rows that will be read, all shards for None; local ones are there."""
        return

    @abstractmethod
    def describe(self, row: int) -> str:
        """Return the place of a row in words: shard, member, first token in it."""

    @abstractmethod
    def place(self, row: int, position: int) -> str:
        """Return the place of one token of a row in words: file, member, token in it, byte of the file."""

    def read_known(self, rows: Integers, vocab_size: int) -> RowArrays:
        """Read rows for a model.

        Raises:
            DataError: A token id is not below its vocabulary; manifests say so before, unless a shard is damaged.
        """
        batch = self.read(rows)
        tokens = batch["tokens"]
        if rows.size and tokens.max() >= vocab_size:
            line, position = (int(number) for number in np.argwhere(tokens >= vocab_size)[0])
            raise DataError(
                f"every token id must be below model.vocab_size = {vocab_size:,}",
                f"id {tokens[line, position]:,} at {self.place(int(rows[line]), position)}",
                "Its manifest promises smaller ids: copy the shard again from its source, or build the shards again; "
                "`mtp data verify FOLDER` names all damage",
            )
        return batch

    def spread(self, num_rows: int) -> Integers:
        """Return the numbers of so many rows, spread evenly."""
        return np.arange(num_rows) * len(self) // num_rows

    def refuse_outside(self, rows: Integers) -> None:
        """Check that there are such rows.

        Raises:
            DataError: There are not.
        """
        numbers = rows.tolist()  # a batch has few: faster than arrays
        if numbers and (min(numbers) < 0 or max(numbers) >= len(self)):
            raise DataError(
                f"a row of {self.split} must be in [0, {len(self):,})",
                f"{min(numbers)} to {max(numbers)}" if len(numbers) > 1 else str(numbers[0]),
                "Choose a row in the range",
            )


@final
class WindowDataset(SequenceSource):
    """Rows as cut: row i holds T + n consecutive tokens, and the next one begins T tokens later.

    Rows run across the members of a shard, not across shards. Row to bytes is arithmetic on the index; nothing is
    read before a row is asked for. Copies sent to other processes map anew.
    """

    def __init__(
        self, folder: Path, split: Split, *, seq_len: int, num_offsets: int, cache: ShardCache | None = None
    ) -> None:
        """Open a shard folder and check that every shard file has its size; with a cache, the shards come from there.

        Raises:
            DataError: The folder is damaged, or no shard of the split is as long as one row.
        """
        self.folder = folder
        self.split = split
        self.width_tokens = seq_len + num_offsets
        self._stride_tokens = seq_len
        self._maps = ShardMaps(folder, split, cache)
        self.manifest = self._maps.manifest
        shard_tokens = np.array([shard.num_tokens for shard in self._maps.shards], dtype=np.int64)
        self.shard_rows = np.maximum(0, (shard_tokens - self.width_tokens) // seq_len + 1)
        self._first_rows = np.concatenate([[0], np.cumsum(self.shard_rows)])
        self._is_masked = self.manifest.is_masked(split)
        self._fetches_all = False
        self._refuse_none(int(shard_tokens.max(initial=0)))

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._first_rows[-1])

    @property
    def manifests(self) -> list[Manifest]:
        """What the folder holds."""
        return [self.manifest]

    def read(self, rows: Integers) -> RowArrays:
        """Read rows; there is a mask where the split has prompts."""
        places, starts = self._locate(rows)
        width = self.width_tokens
        different = set(places.tolist())
        if len(different) == 1 and not self._is_masked:  # no second copy
            shard = self._maps[different.pop()]
            return {"tokens": shard.tokens(starts, width), "documents": shard.documents(starts, width)}
        tokens = np.empty((rows.size, width), dtype=self.manifest.dtype)  # (B, T+n)
        documents = np.empty(tokens.shape, dtype=np.int32)
        masks = np.empty(tokens.shape, dtype=np.bool_) if self._is_masked else None
        for place in different:
            inside = np.flatnonzero(places == place)
            shard = self._maps[place]
            tokens[inside] = shard.tokens(starts[inside], width)
            documents[inside] = shard.documents(starts[inside], width)
            if masks is not None:
                masks[inside] = shard.loss_mask(starts[inside], width)
        batch: RowArrays = {"tokens": tokens, "documents": documents}
        return batch if masks is None else {**batch, "loss_mask": masks}

    def read_tokens(self, rows: Integers) -> NDArray[Any]:
        """Read the tokens of rows alone, (B, T+n)."""
        places, starts = self._locate(rows)
        if len(set(places.tolist())) == 1:
            return self._maps[int(places[0])].tokens(starts, self.width_tokens)
        return self.read(rows)["tokens"]

    def fetch_ahead(self, rows: Integers | None) -> None:
        """Begin to fetch the shards of rows that the cache lacks."""
        if self._maps.cache is None:
            return
        if rows is not None:
            places = list(dict.fromkeys(self._locate(rows)[0].tolist()))
            self._maps.keep_only(places)
            self._maps.cache.fetch_ahead([self._maps.shards[place] for place in places])
        elif not self._fetches_all:
            self._fetches_all = True
            self._maps.cache.fetch_ahead(self._maps.shards)

    def describe(self, row: int) -> str:
        """Return the place of a row in words: shard, member, first token in it."""
        places, starts = self._locate(np.array([row]))
        place = int(places[0])
        return self._maps[place].describe(int(starts[0]), self._maps.shards[place].name)

    def place(self, row: int, position: int) -> str:
        """Return the place of one token of a row in words."""
        places, starts = self._locate(np.array([row]))
        return self._maps.describe(int(places[0]), int(starts[0]) + position)

    def _locate(self, rows: Integers) -> tuple[Integers, Integers]:
        """Return for each row its shard (counted within the split) and its first token there."""
        self.refuse_outside(rows)
        places = self._first_rows.searchsorted(rows, side="right") - 1
        return places, (rows - self._first_rows[places]) * self._stride_tokens

    def _refuse_none(self, most_tokens: int) -> None:
        if len(self) == 0:
            raise DataError(
                f"a shard of {self.split} must have the T + n = {self.width_tokens} tokens of one row",
                f"{most_tokens} tokens in the longest of {len(self._maps.shards)} in {self.folder}",
                "Add documents, or lower data.seq_len",
            )
