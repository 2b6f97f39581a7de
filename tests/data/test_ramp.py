"""A batch that grows: the position alone says how large the next step is, on any ranks and after any resume."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_lightning.data.loading.corpus import prepare_shards
from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.data.loading.dataset import RankSlices
from mtp_lightning.data.sampling.order import Range, with_skipped, without_skipped
from mtp_lightning.errors import DataError
from mtp_lightning.recipe.schema.data import BatchSection, RampSection
from tests.data.corpora import tiny_recipe

RAMP = {"global_batch_size": 8, "micro_batch_size": 2, "ramp": {"from_batch_size": 2, "over_samples": 30}}


@st.composite
def ramps(draw: st.DrawFn, shares: int = 1) -> BatchSection:
    """A ramp whose every step so many ranks can share."""
    first = shares * draw(st.integers(1, 4))
    ramp = RampSection(from_batch_size=first, over_samples=draw(st.integers(1, 500)))
    return BatchSection(global_batch_size=first * draw(st.integers(1, 9)), micro_batch_size=1, ramp=ramp)


def steps_by_hand(batch: BatchSection, steps: int) -> list[tuple[int, int]]:
    """Position and rows of each step: one after another."""
    found, position = [], 0
    for _ in range(steps):
        found.append((position, batch.batch_size_at(position)))
        position += found[-1][1]
    return found


@given(ramps(), st.integers(0, 300))
def test_rows_of_many_steps_are_counted_at_once(batch: BatchSection, steps: int) -> None:
    assert batch.samples_after(steps) == sum(rows for _, rows in steps_by_hand(batch, steps))


@given(ramps())
def test_steps_grow_from_the_first_size_to_the_last_in_equal_parts(batch: BatchSection) -> None:
    assert batch.ramp is not None
    sizes = [batch.batch_size_at(position) for position in range(batch.ramp.over_samples + 1)]
    assert sizes[-1] == batch.global_batch_size
    assert (
        batch.ramp.over_samples < batch.global_batch_size // batch.ramp.from_batch_size
        or sizes[0] == batch.ramp.from_batch_size
    )
    assert all(one <= other for one, other in itertools.pairwise(sizes))
    assert all(size % batch.ramp.from_batch_size == 0 for size in sizes)
    spans = [len(list(group)) for _, group in itertools.groupby(sizes[:-1])]
    assert max(spans) - min(spans) <= 1


@given(
    batch=ramps(shares=12),
    world_sizes=st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=4),
    stops=st.lists(st.integers(1, 12), min_size=4, max_size=4),
    skipped=st.lists(st.tuples(st.integers(0, 200), st.integers(1, 20)), max_size=3),
)
def test_resuming_at_any_step_on_any_ranks_gives_the_same_global_batches(
    batch: BatchSection, world_sizes: list[int], stops: list[int], skipped: list[tuple[int, int]]
) -> None:
    ranges: list[Range] = []
    for begin, length in skipped:
        ranges = with_skipped(ranges, begin, begin + length)
    position, found = 0, []
    for world_size, steps in zip(world_sizes, stops, strict=False):
        ranks = [
            RankSlices(rows_consumed=position, batch=batch, rank=rank, world_size=world_size, skip_ranges=tuple(ranges))
            for rank in range(world_size)
        ]
        for parts in itertools.islice(zip(*ranks, strict=True), steps):
            assert len({len(part) for part in parts}) == 1
            found.append(list(itertools.chain(*parts)))
            position += len(found[-1])
    wanted = [
        without_skipped(np.arange(begin, begin + rows), ranges).tolist()
        for begin, rows in steps_by_hand(batch, len(found))
    ]
    assert found == wanted


@pytest.fixture
def cache(tmp_path: Path, corpus: Path) -> Path:
    prepare_shards(tiny_recipe(tmp_path / "cache", corpus))
    return tmp_path / "cache"


def build(cache: Path, corpus: Path, rank: int = 0, world_size: int = 1, **changes: Any) -> MtpDataModule:
    module = MtpDataModule(tiny_recipe(cache, corpus, **{"batch": RAMP, **changes}))
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
    module.setup("fit")
    return module


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_batches_that_grow_are_read_on_by_other_ranks(cache: Path, corpus: Path, workers: int) -> None:
    constant = build(cache, corpus, batch={"global_batch_size": 1, "micro_batch_size": 1})
    rows = [batch["tokens"][0].tolist() for batch in itertools.islice(constant.train_dataloader(), 80)]
    first = build(cache, corpus)
    seen = []
    for batch in itertools.islice(first.train_dataloader(), 6):
        seen.append(batch["tokens"].tolist())
        first.advance(len(seen[-1]))
    assert [len(batch) for batch in seen] == [2, 2, 2, 2, 2, 4]
    state = json.loads(json.dumps(first.state_dict()))
    ranks = [build(cache, corpus, rank, 2, data={"workers": workers}) for rank in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    for parts in itertools.islice(zip(*(rank.train_dataloader() for rank in ranks), strict=True), 6):
        seen.append([row for part in parts for row in part["tokens"].tolist()])
    assert [len(batch) for batch in seen[6:]] == [4, 4, 6, 6, 8, 8]
    assert list(itertools.chain(*seen)) == rows[: sum(map(len, seen))]


def test_first_steps_must_be_shared_by_all_ranks(cache: Path, corpus: Path) -> None:
    with pytest.raises(
        DataError, match=r"batch\.ramp\.from_batch_size must be a multiple of the number of ranks, 4; found 2"
    ):
        build(cache, corpus, world_size=4)
