"""An order for data that lies far away: shards are shuffled, and rows within groups of shards that fit in a cache."""

from typing import final

import numpy as np

from mtp_lightning.data.sampling.order import ROWS, Numbers, Order, permute

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
        here = order[group * self._group_shards : (group + 2) * self._group_shards]
        if group + 1 == ends.size:
            here = np.concatenate([here, self._groups(epoch + 1)[0][: self._group_shards]])
        return self._first_rows[here[self._shard_rows[here] > 0]]

    def _rows_of_epoch(self, positions: Numbers, epoch: int) -> Numbers:
        order, ends = self._groups(epoch)
        groups = np.searchsorted(ends, positions, side="right")
        rows = np.empty_like(positions)
        for group in set(groups.tolist()):
            inside = np.flatnonzero(groups == group)
            members = order[group * self._group_shards : (group + 1) * self._group_shards]
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
