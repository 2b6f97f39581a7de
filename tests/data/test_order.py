import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mtp_lightning.data.sampling.order import permute, rows_of_samples

SIZES = st.integers(1, 5000)
SEEDS = st.integers(0, 2**63)


@given(size=SIZES, seed=SEEDS, epoch=st.integers(0, 10**6))
@example(size=1, seed=0, epoch=0)
@example(size=2, seed=0, epoch=0)
@example(size=4096, seed=0, epoch=0)
@example(size=4097, seed=0, epoch=0)
def test_every_epoch_visits_every_row_once(size: int, seed: int, epoch: int) -> None:
    rows = permute(np.arange(size), seed=seed, epoch=epoch, size=size)
    assert np.array_equal(np.sort(rows), np.arange(size))


@given(size=SIZES, seed=SEEDS, begin=st.integers(0, 20_000), count=st.integers(1, 300))
def test_rows_of_samples_are_pure_and_cross_epochs(size: int, seed: int, begin: int, count: int) -> None:
    samples = np.arange(begin, begin + count)
    together = rows_of_samples(samples, seed=seed, num_rows=size)
    for place in (0, count // 2, count - 1):
        sample = samples[place]
        alone = permute(np.array([sample % size]), seed=seed, epoch=int(sample // size), size=size)
        assert together[place] == alone[0]


def test_large_ranges_are_reached_at_once() -> None:
    size = 10**12 + 39
    rows = permute(np.arange(10**11, 10**11 + 1000), seed=1, epoch=2, size=size)
    assert rows.min() >= 0
    assert rows.max() < size
    assert np.unique(rows).size == 1000
    assert abs(rows.mean() / size - 0.5) < 0.05


@pytest.mark.parametrize("size", [1000, 1024, 50_000])
def test_order_looks_random(size: int) -> None:
    rows = permute(np.arange(size), seed=3, epoch=0, size=size)
    limit = 5 / np.sqrt(size)  # five standard deviations of a correlation of independent values
    assert abs(np.corrcoef(np.arange(size), rows)[0, 1]) < limit
    for lag in (1, 2, 16):
        assert abs(np.corrcoef(rows[:-lag], rows[lag:])[0, 1]) < limit
    assert np.mean(np.abs(np.diff(rows))) == pytest.approx(size / 3, rel=0.1)
    counts = np.histogram2d(np.arange(size), rows, bins=8)[0]  # 64 cells, 49 degrees of freedom
    expected = size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 49 + 5 * np.sqrt(2 * 49)


def test_seeds_and_epochs_give_other_orders() -> None:
    orders = [
        permute(np.arange(2000), seed=seed, epoch=epoch, size=2000) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]
    ]
    for first in range(4):
        for second in range(first):
            assert np.mean(orders[first] == orders[second]) < 0.01


def test_order_is_the_same_on_every_machine() -> None:
    assert permute(np.arange(8), seed=0, epoch=0, size=1000).tolist() == [
        152,
        757,
        978,
        425,
        28,
        713,
        529,
        667,
    ]
    assert permute(np.arange(3), seed=7, epoch=2, size=10**9).tolist() == [295717731, 628668051, 638856436]
