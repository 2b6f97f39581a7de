"""Mixtures: exact quotas, each source in an order of its own, the same for any number of ranks."""

import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.data.loading.factory import open_data, prepare_data
from mtp_lightning.data.sampling.mixture import MixedOrder, plan_blocks, quotas_of
from mtp_lightning.data.sampling.order import ShuffledOrder
from mtp_lightning.data.sampling.windows import WindowDataset
from mtp_lightning.data.shards.manifest import load_manifest
from mtp_lightning.errors import CheckpointError, DataError
from mtp_lightning.recipe.schema.data import MIXTURE_BLOCK_ROWS
from mtp_lightning.recipe.schema.root import Recipe
from tests.data.corpora import END, build_tiny, tiny_recipe, write_corpus

weights_lists = st.lists(st.floats(0.01, 100), min_size=1, max_size=6)


def mixed(sizes: list[int], weights: list[float], seed: int = 3) -> MixedOrder:
    orders = [ShuffledOrder(seed=seed, num_rows=size, purpose=f"rows of source {i}") for i, size in enumerate(sizes)]
    quotas = quotas_of(weights, MIXTURE_BLOCK_ROWS)
    return MixedOrder(seed=seed, quotas=tuple(quotas), orders=tuple(orders), sizes=tuple(sizes))


@given(weights_lists, st.integers(1, 10_000))
def test_quotas_add_up_and_are_exact_to_one(weights: list[float], total: int) -> None:
    quotas = quotas_of(weights, total)
    assert sum(quotas) == total
    assert all(abs(quota - weight / sum(weights) * total) < 1 for quota, weight in zip(quotas, weights, strict=True))


@given(weights_lists, st.integers(0, 10**9), st.integers(0, 2**32 - 1))
def test_every_block_holds_the_quotas_exactly(weights: list[float], block: int, seed: int) -> None:
    order = mixed([10_000] * len(weights), weights, seed)
    samples = np.arange(block * MIXTURE_BLOCK_ROWS, (block + 1) * MIXTURE_BLOCK_ROWS)
    sources, numbers = order.sources(samples)
    for source, quota in enumerate(order.quotas):
        own = np.sort(numbers[sources == source])
        assert own.tolist() == list(range(block * quota, (block + 1) * quota))


@given(weights_lists, st.integers(0, 20_000))
def test_samples_of_each_source_are_counted_by_arithmetic(weights: list[float], num_samples: int) -> None:
    order = mixed([10_000] * len(weights), weights)
    counts = Counter(order.sources(np.arange(num_samples))[0].tolist())
    assert order.samples_taken(num_samples) == [counts[source] for source in range(len(weights))]


def test_every_epoch_of_a_source_visits_its_rows_once() -> None:
    sizes, weights = [3000, 5000], [1.0, 3.0]
    order = mixed(sizes, weights)
    samples = np.arange(12 * MIXTURE_BLOCK_ROWS)
    sources, numbers = order.sources(samples)
    rows = order.rows(samples)
    for source, first, size, quota in ((0, 0, 3000, 1024), (1, 3000, 5000, 3072)):
        own = rows[sources == source][np.argsort(numbers[sources == source])] - first
        assert own.size == 12 * quota
        for epoch in range(own.size // size):
            assert np.array_equal(np.sort(own[epoch * size : (epoch + 1) * size]), np.arange(size))
        assert not np.array_equal(own[:size], own[size : 2 * size])


def test_sources_are_interleaved_within_a_block() -> None:
    sources = mixed([10_000] * 2, [1, 1]).sources(np.arange(MIXTURE_BLOCK_ROWS))[0]
    runs = np.flatnonzero(np.diff(sources)).size
    assert abs(runs - MIXTURE_BLOCK_ROWS / 2) < 5 * np.sqrt(MIXTURE_BLOCK_ROWS / 4)
    assert not np.array_equal(sources, mixed([10_000] * 2, [1, 1], seed=4).sources(np.arange(MIXTURE_BLOCK_ROWS))[0])


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=40))
def test_rows_do_not_depend_on_what_is_asked_for_together(samples: list[int]) -> None:
    order = mixed([3000, 5000, 7000], [1, 2, 3])
    together = order.rows(np.array(samples, dtype=np.int64))
    assert [order.rows(np.array([sample], dtype=np.int64))[0] for sample in samples] == together.tolist()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folders of shards: two of random bytes, one of chats."""
    root = tmp_path_factory.mktemp("mixture")
    for seed, name in enumerate(["code", "web"]):
        write_corpus(root / f"{name}_text", num_documents=1600, seed=seed)
        build_tiny([str(root / f"{name}_text")], root / name, member_tokens=1000, shard_bytes=30_000)
    lines = [json.dumps({"prompt": f"ask {i}", "completion": f"answer {i * i}"}) for i in range(6000)]
    (root / "chat.jsonl").write_text("\n".join(lines))
    build_tiny([str(root / "chat.jsonl")], root / "chat", member_tokens=1000, shard_bytes=30_000)
    return root


def mixture_recipe(root: Path, weights: dict[str, float], **changes: dict[str, Any]) -> Recipe:
    data = {"mixture": {str(root / name): weight for name, weight in weights.items()}, **changes.pop("data", {})}
    return tiny_recipe(root / "cache", root / "none", data=data, **changes)


def build(
    root: Path, weights: dict[str, float], *, rank: int = 0, world_size: int = 1, **changes: Any
) -> MtpDataModule:
    module = MtpDataModule(mixture_recipe(root, weights, **changes))
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
    module.prepare_data()
    module.setup("fit")
    return module


def take(module: MtpDataModule, steps: int) -> list[torch.Tensor]:
    return [batch["tokens"] for batch in itertools.islice(module.train_dataloader(), steps)]


def num_chats(batch: dict[str, Any]) -> int:
    """Count rows of plain ASCII; one in 2,048 windows of random bytes looks like it, too."""
    tokens = batch["tokens"]
    return int(((tokens < 128) | (tokens == END)).all(axis=1).sum())


def test_a_run_reads_each_source_as_its_share_says(folders: Path) -> None:
    recipe = mixture_recipe(folders, {"code": 3, "chat": 1})
    prepare_data(recipe)
    opened = open_data(recipe, "train")
    batch = opened.rows.read(opened.order.rows(np.arange(MIXTURE_BLOCK_ROWS)))
    assert abs(num_chats(batch) - 1024) < 10
    assert not batch["loss_mask"].all()
    alone = {name: WindowDataset(folders / name, "train", seq_len=8, num_offsets=3) for name in ("code", "chat")}
    known = {tuple(row) for rows in alone.values() for row in rows.read(np.arange(len(rows)))["tokens"].tolist()}
    assert {tuple(row) for row in batch["tokens"].tolist()} <= known


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_the_global_batch_in_order(folders: Path, world_size: int) -> None:
    weights = {"code": 1.0, "web": 2.0, "chat": 0.5}
    whole = take(build(folders, weights), 4)
    parts = [take(build(folders, weights, rank=rank, world_size=world_size), 4) for rank in range(world_size)]
    for step in range(4):
        assert torch.equal(torch.cat([part[step] for part in parts]), whole[step])


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_resumed_mixture_goes_on(folders: Path, workers: int) -> None:
    weights = {"code": 1.0, "web": 2.0}
    whole = take(build(folders, weights), 6)
    state = json.loads(json.dumps({**build(folders, weights).state_dict(), "rows_consumed": 24}))
    resumed = build(folders, weights, data={"workers": workers})
    resumed.load_state_dict(state)
    assert all(map(torch.equal, take(resumed, 3), whole[3:]))


def test_order_and_names_of_the_sources_decide_nothing(folders: Path, tmp_path: Path) -> None:
    one = build(folders, {"code": 1.0, "web": 2.0})
    (tmp_path / "moved").symlink_to(folders / "code")
    other = MtpDataModule(
        tiny_recipe(tmp_path, tmp_path, data={"mixture": {str(folders / "web"): 4.0, str(tmp_path / "moved"): 2.0}})
    )
    other.load_state_dict(one.state_dict())
    assert all(map(torch.equal, take(one, 3), take(other, 3)))


@pytest.mark.parametrize("weights", [{"code": 1.0, "web": 2.1}, {"code": 1.0, "chat": 2.0}, {"code": 1.0}])
def test_another_mixture_is_refused_on_resume(folders: Path, weights: dict[str, float]) -> None:
    state = build(folders, {"code": 1.0, "web": 2.0}).state_dict()
    with pytest.raises(CheckpointError, match=r"mixture = .* in the recipe; found .*mixture = .* in the checkpoint"):
        build(folders, weights).load_state_dict(state)


def test_held_out_rows_are_spread_by_weight(folders: Path) -> None:
    recipe = mixture_recipe(folders, {"code": 3, "chat": 1})
    rows = open_data(recipe, "validation").rows
    batch = rows.read(rows.spread(80))
    assert num_chats(batch) == 20
    assert len(set(rows.spread(len(rows)).tolist())) == len(rows)


def test_source_with_fewer_rows_than_its_quota_is_read_again_in_whole_epochs(folders: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "few", num_documents=20)
    build_tiny([str(tmp_path / "few")], tmp_path / "small")
    (tmp_path / "code").symlink_to(folders / "code")
    data = open_data(mixture_recipe(tmp_path, {"code": 1.0, "small": 1.0}), "train")
    size = len(WindowDataset(tmp_path / "small", "train", seq_len=8, num_offsets=3))
    assert size < MIXTURE_BLOCK_ROWS // 2
    own = [name.endswith("small") for name in data.rows.source_names]  # type: ignore[attr-defined]
    first = 0 if own[0] else len(data.rows) - size
    rows = data.order.rows(np.arange(2 * MIXTURE_BLOCK_ROWS))
    times = Counter(rows[(rows >= first) & (rows < first + size)].tolist())
    assert sum(times.values()) == MIXTURE_BLOCK_ROWS
    assert set(times.values()) == {MIXTURE_BLOCK_ROWS // size, MIXTURE_BLOCK_ROWS // size + 1}


def test_limit_of_epochs_is_held_before_the_first_step(folders: Path) -> None:
    code = str(folders / "code")
    num_rows = len(WindowDataset(folders / "code", "train", seq_len=8, num_offsets=3))
    steps = num_rows * 2 * 2 // 8
    limits = {"data": {"max_epochs": {code: 2.1}}, "run": {"steps": steps}}
    build(folders, {"code": 1.0, "web": 1.0}, **limits)
    limits["data"] = {"max_epochs": {code: 1.5}}
    with pytest.raises(DataError, match=r"must read .*code at most 1\.5 times, .* found (1\.9|2\.0)\d times"):
        build(folders, {"code": 1.0, "web": 1.0}, **limits)


def test_the_same_shards_twice_are_refused(folders: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(folders / "code")
    with pytest.raises(DataError, match="must be different shards; found the same in .*one and .*two"):
        build(tmp_path, {"one": 1.0, "two": 1.0})


def test_missing_source_is_named(folders: Path) -> None:
    with pytest.raises(DataError, match="must have its manifest, .*nowhere"):
        build(folders, {"code": 1.0, "nowhere": 1.0})
    assert load_manifest(folders / "code")


def scheduled(rows: list[int], weights: list[list[float]], *, is_linear: bool, seed: int = 3) -> MixedOrder:
    order = mixed([1000] * len(weights[0]), weights[-1], seed)
    return dataclasses.replace(order, planned=plan_blocks(rows, weights, is_linear=is_linear))


def shares_by_hand(rows: list[int], weights: list[list[float]], num_rows: int, *, is_linear: bool) -> Any:
    """Weights at the middle of every row, as shares: (rows, sources)."""
    middles = np.arange(num_rows) + 0.5
    own = np.array(weights)
    if is_linear:
        found = np.stack([np.interp(middles, rows, own[:, source]) for source in range(own.shape[1])], axis=1)
    else:
        found = own[np.maximum(np.searchsorted(rows, middles, side="right") - 1, 0)]
    return found / found.sum(axis=1, keepdims=True)


SCHEDULES: list[tuple[list[int], list[list[float]]]] = [
    ([0, 40_000], [[1, 3], [4, 1]]),
    ([0, 20_000, 50_000], [[1, 0, 2], [1, 1, 0], [1, 5, 1]]),
    ([1000, 1064, 9000], [[1, 1], [1, 9], [1, 0]]),
    ([0, 5000], [[1, 0.001], [0.001, 1]]),
    ([777], [[1, 2]]),
]


@pytest.mark.parametrize("is_linear", [True, False])
@pytest.mark.parametrize(("rows", "weights"), SCHEDULES)
def test_shares_follow_the_integral_of_the_weights(
    rows: list[int], weights: list[list[float]], *, is_linear: bool
) -> None:
    order = scheduled(rows, weights, is_linear=is_linear)
    num_rows = rows[-1] + 2 * MIXTURE_BLOCK_ROWS
    wanted = shares_by_hand(rows, weights, num_rows, is_linear=is_linear).cumsum(axis=0)
    found = (order.sources(np.arange(num_rows))[0][:, None] == np.arange(len(weights[0]))).cumsum(axis=0)
    ends = np.arange(63, order.planned.num_samples, 64) if order.planned else np.array([])
    assert np.abs(found[ends] - wanted[ends]).max() < 16
    assert np.abs(found[-1] - wanted[-1]).max() < MIXTURE_BLOCK_ROWS / 20


@pytest.mark.parametrize("is_linear", [True, False])
@pytest.mark.parametrize(("rows", "weights"), SCHEDULES)
def test_each_source_delivers_its_rows_one_after_another_under_a_schedule(
    rows: list[int], weights: list[list[float]], *, is_linear: bool
) -> None:
    order = scheduled(rows, weights, is_linear=is_linear)
    num_rows = order.planned.num_samples + 2 * MIXTURE_BLOCK_ROWS if order.planned else 0
    sources, numbers = order.sources(np.arange(num_rows))
    for source in range(len(weights[0])):
        assert np.sort(numbers[sources == source]).tolist() == list(range((sources == source).sum()))
    for begin in (0, 63, 64, 700, num_rows - 5000):
        part = order.sources(np.arange(begin, begin + 3000))
        assert np.array_equal(part, (sources[begin : begin + 3000], numbers[begin : begin + 3000]))
        assert order.samples_taken(begin) == np.bincount(sources[:begin], minlength=len(weights[0])).tolist()


def test_a_long_schedule_is_planned_in_as_many_blocks_as_a_short_one() -> None:
    planned = plan_blocks([0, 10**12], [[1, 0], [1, 3]], is_linear=True)
    assert len(planned.quotas) <= 1 << 16
    wanted = 10**12 * (1 - np.log(4) / 3)  # integral of 3t / (1 + 3t)
    assert abs(int(planned.quotas[:, 1].sum()) / wanted - 1) < 1e-4


def build_scheduled(folders: Path, *, between: str = "linear", **changes: Any) -> MtpDataModule:
    weights = {str(folders / "code"): [1, 4], str(folders / "web"): [3, 0]}
    schedule = {"at_rows": [0, 200], "weights": weights, "between": between}
    return build(folders, {"code": 1, "web": 1}, data={"mixture_schedule": schedule}, **changes)


def test_rows_under_a_schedule_are_those_of_the_whole_run_wherever_it_was_interrupted(folders: Path) -> None:
    whole = [batch["tokens"] for batch in itertools.islice(build_scheduled(folders).train_dataloader(), 40)]
    for step, world_size in ((1, 2), (7, 4), (16, 1), (31, 2), (39, 8)):
        parts = []
        for rank in range(world_size):
            module = build_scheduled(folders, rank=rank, world_size=world_size)
            module.load_state_dict({**module.state_dict(), "rows_consumed": 8 * step})
            parts.append(next(iter(module.train_dataloader()))["tokens"])
        assert torch.cat(parts).equal(whole[step])


def test_another_schedule_is_another_run_and_too_many_epochs_are_refused(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = build_scheduled(folders).state_dict()
    assert f"mixture from row 200: 100.0% {folders / 'code'}, 0.0% {folders / 'web'}" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="mixture"):
        build_scheduled(folders, between="steps").load_state_dict(state)
    schedule = {"at_rows": [0, 200], "weights": {str(folders / "web"): [3, 0]}}
    limited = {"mixture_schedule": schedule, "max_epochs": {str(folders / "web"): 0.001}}
    with pytest.raises(DataError, match=r"at most 0.001 times"):
        build(folders, {"code": 1, "web": 1}, data=limited)
