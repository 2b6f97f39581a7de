"""Shards in a shuffled order, rows within groups of them: every row once, and only of the group that is read."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mtp_lightning.data.sampling.mixture import MixedOrder, quotas_of
from mtp_lightning.data.sampling.order import ShardLocalShuffle
from mtp_lightning.recipe.schema.data import MIXTURE_BLOCK_ROWS

shard_rows_lists = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(sum)


def grouped(shard_rows: list[int], shuffle_shards: int = 3, seed: int = 5) -> ShardLocalShuffle:
    return ShardLocalShuffle(seed=seed, shard_rows=np.array(shard_rows, dtype=np.int64), shuffle_shards=shuffle_shards)


def shards_of(rows: np.ndarray, shard_rows: list[int]) -> np.ndarray:
    return np.searchsorted(np.cumsum(shard_rows), rows, side="right")


@given(shard_rows_lists, st.integers(1, 12), st.integers(0, 10**6), st.integers(0, 2**63))
def test_every_epoch_visits_every_row_once(shard_rows: list[int], shuffle_shards: int, epoch: int, seed: int) -> None:
    size = sum(shard_rows)
    samples = np.arange(epoch * size, (epoch + 1) * size)
    rows = grouped(shard_rows, shuffle_shards, seed).rows(samples)
    assert np.array_equal(np.sort(rows), np.arange(size))


@given(shard_rows_lists, st.integers(1, 12), st.lists(st.integers(0, 5000), min_size=1, max_size=40))
def test_rows_do_not_depend_on_what_is_asked_for_together(
    shard_rows: list[int], shuffle_shards: int, samples: list[int]
) -> None:
    together = grouped(shard_rows, shuffle_shards).rows(np.array(samples, dtype=np.int64))
    alone = [grouped(shard_rows, shuffle_shards).rows(np.array([sample], dtype=np.int64))[0] for sample in samples]
    assert together.tolist() == alone


@given(shard_rows_lists, st.integers(1, 12), st.integers(0, 5000))
@example([0, 1, 1], 1, 0)
@example([1, 1, 0], 1, 1)
def test_shards_are_known_before_they_are_read(shard_rows: list[int], shuffle_shards: int, sample: int) -> None:
    order = grouped(shard_rows, shuffle_shards)
    told = set(shards_of(order.lookahead(sample), shard_rows).tolist())
    assert len(told) <= 2 * shuffle_shards
    assert set(shards_of(order.rows(np.array([sample, sample + 1])), shard_rows).tolist()) <= told


def test_rows_of_a_group_are_mixed_and_groups_change_with_the_epoch() -> None:
    order = grouped([100] * 12, shuffle_shards=4)
    shards = shards_of(order.rows(np.arange(2400)), [100] * 12)
    groups = [set(shards[begin : begin + 400].tolist()) for begin in range(0, 2400, 400)]
    assert all(len(group) == 4 for group in groups)
    assert set.union(*groups[:3]) == set.union(*groups[3:]) == set(range(12))
    assert groups[:3] != groups[3:]
    assert np.flatnonzero(np.diff(shards[:400])).size == pytest.approx(300, abs=45)


def test_any_sample_is_reached_at_once() -> None:
    order = grouped([20_000] * 50_000, shuffle_shards=8)  # 10^9 rows
    samples = np.arange(17 * 10**9 + 123, 17 * 10**9 + 1123)
    rows = order.rows(samples)
    assert np.unique(rows).size == 1000
    assert len(set(shards_of(rows, [20_000] * 50_000).tolist())) <= 16


def test_sources_of_a_mixture_tell_their_shards_too() -> None:
    sizes = [[5000] * 10, [3000] * 30]
    orders = tuple(
        ShardLocalShuffle(seed=1, shard_rows=np.array(rows), shuffle_shards=2, purpose=f"rows of source {number}")
        for number, rows in enumerate(sizes)
    )
    quotas = tuple(quotas_of([1, 3], MIXTURE_BLOCK_ROWS))
    mixed = MixedOrder(seed=1, quotas=quotas, orders=orders, sizes=(50_000, 90_000))
    both = [5000] * 10 + [3000] * 30
    for sample in (0, 100, 60_000, 123_456):
        told = set(shards_of(mixed.lookahead(sample), both).tolist())
        assert len(told) <= 8
        assert set(shards_of(mixed.rows(np.arange(sample, sample + 1000)), both).tolist()) <= told
