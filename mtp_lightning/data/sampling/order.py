"""The order of the rows: a keyed bijection, so that no permutation is stored and any position is reached at once."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 6
ROWS = "row order 1"
Words = NDArray[np.uint64]
Numbers = NDArray[np.int64]
Range = tuple[int, int]  # from the first sample to before the second


class Order(ABC):
    """Which row each sample of a run reads: a pure function, so copies agree."""

    @abstractmethod
    def rows(self, samples: Numbers) -> Numbers:
        """Return the row of each sample; sample numbers grow without end over the epochs."""

    def lookahead(self, sample: int) -> Numbers | None:
        """Return rows out of all shards that are read at a sample and for a while after it; None where any may be."""
        return None


@final
@dataclass(frozen=True, kw_only=True)
class ShuffledOrder(Order):
    """All rows in an order of their own in every epoch."""

    seed: int
    num_rows: int
    purpose: str = ROWS

    def rows(self, samples: Numbers) -> Numbers:
        """Return the row of each sample."""
        return rows_of_samples(samples, seed=self.seed, num_rows=self.num_rows, purpose=self.purpose)


def without_skipped(numbers: Numbers, ranges: Sequence[Range]) -> Numbers:
    """Return the samples that are left to the numbers 0, 1, 2, … when ranges of samples are left out.

    The ranges are sorted and apart from one another.

    >>> without_skipped(np.arange(6), [(1, 3), (5, 6)]).tolist()
    [0, 3, 4, 6, 7, 8]
    """
    lengths = np.array([0, *(end - begin for begin, end in ranges)], dtype=np.int64)
    before = np.cumsum(lengths)  # samples left out before each range, and in all
    begins = np.array([begin for begin, _ in ranges], dtype=np.int64) - before[:-1]
    return numbers + before[np.searchsorted(begins, numbers, side="right")]


def with_skipped(ranges: Sequence[Range], begin: int, end: int) -> list[Range]:
    """Return the ranges with one more left out; where ranges meet they become one.

    >>> with_skipped([(1, 3), (8, 9)], 3, 5)
    [(1, 5), (8, 9)]
    """
    joined: list[Range] = []
    for own in sorted([*ranges, (begin, end)]):
        if joined and own[0] <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], own[1]))
        else:
            joined.append(own)
    return joined


def rows_of_samples(samples: Numbers, *, seed: int, num_rows: int, purpose: str = ROWS) -> Numbers:
    """Return the row that each sample of a run reads; sample numbers grow without end over the epochs.

    A pure function of (seed, sample, number of rows): it knows neither ranks nor workers nor what was read before.
    Every epoch visits each row once.
    """
    epochs = samples // num_rows
    rows = np.empty_like(samples)
    for epoch in np.unique(epochs):
        inside = epochs == epoch
        rows[inside] = permute(samples[inside] % num_rows, seed=seed, epoch=int(epoch), size=num_rows, purpose=purpose)
    return rows


def permute(positions: Numbers, *, seed: int, epoch: int, size: int, purpose: str = ROWS) -> Numbers:
    """Map positions in [0, size) to values in [0, size), one to one; each purpose has orders of its own.

    A Feistel network over the smallest power of two that holds `size`; a value outside is sent through it again until
    it falls inside (cycle walking, fewer than two passes on average).
    """
    num_bits = max(2, (size - 1).bit_length())
    keys = _round_keys(purpose, seed, epoch)
    values = _feistel(positions.astype(np.uint64), keys, num_bits)
    outside = np.flatnonzero(values >= size)
    while outside.size:
        values[outside] = _feistel(values[outside], keys, num_bits)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def _round_keys(purpose: str, seed: int, epoch: int) -> Words:
    digest = hashlib.shake_256(f"{purpose}: seed {seed}, epoch {epoch}".encode()).digest(8 * NUM_ROUNDS)
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _feistel(values: Words, keys: Words, num_bits: int) -> Words:
    num_low_bits = np.uint64(num_bits // 2)
    low_mask = np.uint64((1 << (num_bits // 2)) - 1)
    high_mask = np.uint64((1 << (num_bits - num_bits // 2)) - 1)
    low, high = values & low_mask, values >> num_low_bits
    # Halves of unequal width are never swapped: each round changes one half by a function of the other.
    for i in range(0, NUM_ROUNDS, 2):
        high = high ^ (_mix(low + keys[i]) & high_mask)
        low = low ^ (_mix(high + keys[i + 1]) & low_mask)
    return (high << num_low_bits) | low


def _mix(words: Words) -> Words:
    """Scatter the bits of each word: the finalizer of splitmix64 [Steele, Lea & Flood 2014]."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


SHARDS = "shard order 1"


@final
class ShardLocalShuffle(Order):
    """Rows of one group of shards after another; which shards are together changes with every epoch.

    A pure function of (seed, sample, rows of every shard, shards per group). It costs 8 bytes per shard.
    """

    def __init__(self, *, seed: int, shard_rows: Numbers, shuffle_shards: int, purpose: str = ROWS) -> None:
        """Take the number of rows of every shard, in the order in which rows are numbered."""
        self._seed, self._purpose, self._group_shards = seed, purpose, shuffle_shards
        self._shard_rows = shard_rows
        self._first_rows = np.concatenate([[0], np.cumsum(shard_rows)])
        self._num_rows = int(self._first_rows[-1])
        self._groups_of: dict[int, tuple[Numbers, Numbers]] = {}  # of the two epochs asked for last

    def rows(self, samples: Numbers) -> Numbers:
        """Return the row of each sample."""
        epochs = samples // self._num_rows
        rows = np.empty_like(samples)
        for epoch in set(epochs.tolist()):
            inside = np.flatnonzero(epochs == epoch)
            rows[inside] = self._rows_of_epoch(samples[inside] % self._num_rows, epoch)
        return rows

    def lookahead(self, sample: int) -> Numbers:
        """Return a row of each shard in the group of a sample and the one after it, in the order of their turn."""
        epoch, position = divmod(sample, self._num_rows)
        order, ends = self._groups(epoch)
        group = int(np.searchsorted(ends, position, side="right"))
        following = int(
            np.searchsorted(ends, ends[group], side="right")
        )  # not the next number: a group may have no rows
        here = self._members(order, group)
        if following == ends.size:
            order, ends = self._groups(epoch + 1)
            following = int(np.searchsorted(ends, 0, side="right"))
        here = np.concatenate([here, self._members(order, following)])
        return self._first_rows[here[self._shard_rows[here] > 0]]

    def _members(self, order: Numbers, group: int) -> Numbers:
        return order[group * self._group_shards : (group + 1) * self._group_shards]

    def _rows_of_epoch(self, positions: Numbers, epoch: int) -> Numbers:
        order, ends = self._groups(epoch)
        groups = np.searchsorted(ends, positions, side="right")
        rows = np.empty_like(positions)
        for group in set(groups.tolist()):
            inside = np.flatnonzero(groups == group)
            members = self._members(order, group)
            begins = np.concatenate([[0], np.cumsum(self._shard_rows[members])])
            size = int(begins[-1])
            places = permute(
                positions[inside] - (ends[group] - size),
                seed=self._seed,
                epoch=epoch,
                size=size,
                purpose=f"{self._purpose}, group {group}",
            )
            member = np.searchsorted(begins, places, side="right") - 1
            rows[inside] = self._first_rows[members[member]] + places - begins[member]
        return rows

    def _groups(self, epoch: int) -> tuple[Numbers, Numbers]:
        """Return the shards of an epoch in the order of their turn, and the rows after which each group ends."""
        if epoch not in self._groups_of:
            if len(self._groups_of) == 2:
                del self._groups_of[next(iter(self._groups_of))]
            numbers = np.arange(self._shard_rows.size)
            purpose = f"{SHARDS}: {self._purpose}"
            order = permute(numbers, seed=self._seed, epoch=epoch, size=numbers.size, purpose=purpose)
            last = np.append(numbers[self._group_shards - 1 : -1 : self._group_shards], numbers[-1])
            self._groups_of[epoch] = (order, np.cumsum(self._shard_rows[order])[last])
        return self._groups_of[epoch]
