"""Rows that did harm are left out; the rest stay as they were, on any number of ranks."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_lightning.data.loading.corpus import prepare_shards
from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.data.sampling.order import with_skipped, without_skipped
from mtp_lightning.errors import CheckpointError, DataError
from tests.data.corpora import tiny_recipe

pairs = st.tuples(st.integers(0, 200), st.integers(1, 30))


@given(st.lists(pairs, max_size=8))
def test_samples_are_all_but_the_skipped_ones(given_pairs: list[tuple[int, int]]) -> None:
    ranges: list[tuple[int, int]] = []
    left_out: set[int] = set()
    for begin, length in given_pairs:
        ranges = with_skipped(ranges, begin, begin + length)
        left_out |= set(range(begin, begin + length))
    expected = [sample for sample in range(1000) if sample not in left_out]
    numbers = np.arange(len(expected))
    assert without_skipped(numbers, ranges).tolist() == expected
    assert all(one[1] < other[0] for one, other in itertools.pairwise(ranges))
    assert set(itertools.chain.from_iterable(range(*own) for own in ranges)) == left_out


@pytest.fixture
def cache(tmp_path: Path, corpus: Path) -> Path:
    prepare_shards(tiny_recipe(tmp_path / "cache", corpus))
    return tmp_path / "cache"


def build(cache: Path, corpus: Path, rank: int = 0, world_size: int = 1, **changes: Any) -> MtpDataModule:
    module = MtpDataModule(tiny_recipe(cache, corpus, **changes))
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
    return module


def rows_of(module: MtpDataModule, steps: int) -> list[list[int]]:
    batches = itertools.islice(module.train_dataloader(), steps)
    return torch.cat([batch["tokens"] for batch in batches]).tolist()


def test_training_leaves_out_what_is_skipped_and_nothing_else(cache: Path, corpus: Path) -> None:
    whole = rows_of(build(cache, corpus), 12)
    module = build(cache, corpus)
    module.skip_rows(20, 10)
    module.skip_rows(26, 3)  # which were 36, 37, 38
    assert rows_of(module, 8) == (whole[:20] + whole[30:36] + whole[39:])[:64]


def test_state_carries_what_is_skipped_to_other_ranks(cache: Path, corpus: Path) -> None:
    module = build(cache, corpus)
    module.advance(16)
    module.skip_rows(24, 8)
    module.skip_rows(40, 1)
    state = json.loads(json.dumps(module.state_dict()))
    whole = rows_of(module, 6)
    parts = []
    for rank in range(2):
        part = build(cache, corpus, rank, 2)
        part.load_state_dict(state)
        parts.append(rows_of(part, 6))
    together = [row for step in range(6) for part in parts for row in part[4 * step : 4 * step + 4]]
    assert together == whole


def test_rows_behind_the_position_cannot_be_skipped(cache: Path, corpus: Path) -> None:
    module = build(cache, corpus)
    module.advance(16)
    with pytest.raises(DataError, match="must lie ahead, from 16 on; found 4 from 12 on. Resume"):
        module.skip_rows(12, 4)


def test_state_stays_small(cache: Path, corpus: Path) -> None:
    module = build(cache, corpus)
    module.advance(10**12)
    for number in range(20):
        module.skip_rows(10**12 + 100 * number, 3)
    assert len(json.dumps(module.state_dict())) < 1024
    with pytest.raises(DataError, match="at most 20 ranges"):
        module.skip_rows(2 * 10**12, 3)


@pytest.mark.parametrize("ranges", [None, 3, [3], [[1]], [[1, 2, 3]], [[5, 3]], [[1, 4], [2, 6]], [["1", "4"]]])
def test_damaged_ranges_are_refused(cache: Path, corpus: Path, ranges: object) -> None:
    module = build(cache, corpus)
    with pytest.raises(CheckpointError, match="skip_ranges of a checkpoint must be"):
        module.load_state_dict({**module.state_dict(), "skip_ranges": ranges})


def test_state_from_before_there_were_ranges_is_taken(cache: Path, corpus: Path) -> None:
    module = build(cache, corpus)
    old = {name: module.state_dict()[name] for name in ("version", "fingerprint", "seq_len", "num_offsets", "seed")}
    module.load_state_dict({**old, "rows_consumed": 8})
    assert module.rows_consumed == 8
