import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor

from mtp_lightning.data.loading.corpus import prepare_shards
from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.data.loading.factory import open_rows
from mtp_lightning.data.sampling.order import permute
from mtp_lightning.errors import CheckpointError, DataError
from tests.data.corpora import forge, tiny_recipe, write_corpus

Batch = dict[str, Tensor]


@pytest.fixture
def cache(tmp_path: Path, corpus: Path) -> Path:
    prepare_shards(tiny_recipe(tmp_path / "cache", corpus))
    return tmp_path / "cache"


def build(cache: Path, corpus: Path, *, rank: int = 0, world_size: int = 1, **changes: Any) -> MtpDataModule:
    module = MtpDataModule(tiny_recipe(cache, corpus, **changes))
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
    module.setup("fit")
    return module


def take(module: MtpDataModule, steps: int) -> list[Batch]:
    return list(itertools.islice(module.train_dataloader(), steps))


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys() >= {"tokens", "documents"}
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_batches_are_the_rows_that_the_order_names(cache: Path, corpus: Path) -> None:
    module = build(cache, corpus)
    rows = open_rows(tiny_recipe(cache, corpus), "train")
    num_rows = len(rows)
    steps = 2 * num_rows // 8 + 2  # into the third epoch, batches across both boundaries
    assert num_rows % 8
    batches = take(module, steps)
    wanted = np.concatenate([permute(np.arange(num_rows), seed=5, epoch=e, size=num_rows) for e in range(3)])
    for step, batch in enumerate(batches):
        expected = rows.read(wanted[8 * step : 8 * step + 8])
        assert batch["tokens"].dtype == batch["documents"].dtype == torch.int64
        assert batch["tokens"].shape == (8, 11)
        assert np.array_equal(batch["tokens"].numpy(), expected["tokens"])
        assert np.array_equal(batch["documents"].numpy(), expected["documents"])


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_the_global_batch_in_order(cache: Path, corpus: Path, world_size: int) -> None:
    whole = take(build(cache, corpus), 5)
    parts = [take(build(cache, corpus, rank=rank, world_size=world_size), 5) for rank in range(world_size)]
    together = [{name: torch.cat([part[step][name] for part in parts]) for name in whole[0]} for step in range(5)]
    assert_equal(together, whole)


@pytest.mark.parametrize(
    ("workers", "then"), [(1, 0), *(pytest.param(*row, marks=pytest.mark.slow) for row in ((0, 2), (2, 0)))]
)
def test_resumed_run_sees_the_very_next_batches(cache: Path, corpus: Path, workers: int, then: int) -> None:
    whole = take(build(cache, corpus), 9)
    first = build(cache, corpus, data={"workers": workers})
    batches = iter(first.train_dataloader())
    seen = []
    for _ in range(4):
        seen.append(next(batches))
        first.advance(8)
    next(batches)  # fetched, but its step never completed
    state = json.loads(json.dumps(first.state_dict()))
    assert state["rows_consumed"] == 32
    resumed = build(cache, corpus, data={"workers": then}, batch={"global_batch_size": 8, "micro_batch_size": 2})
    resumed.load_state_dict(state)
    assert_equal(seen + take(resumed, 5), whole)


@pytest.mark.slow
def test_workers_leave_signals_to_the_parent(cache: Path, corpus: Path) -> None:
    batches = iter(build(cache, corpus, data={"workers": 1}).train_dataloader())
    seen = [next(batches)]
    (worker,) = multiprocessing.active_children()
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(worker.pid or 0, name)
    seen += itertools.islice(batches, 5)
    assert_equal(seen, take(build(cache, corpus), 6))


def test_the_next_batches_are_read_while_one_is_trained_on(cache: Path, corpus: Path) -> None:
    loader = build(cache, corpus).train_dataloader()
    begun: list[int] = []
    read = loader.dataset.read
    loader.dataset.read = lambda samples: begun.append(samples[0]) or read(samples)  # type: ignore[method-assign]
    batches = iter(loader)
    next(batches)
    until = time.monotonic() + 10
    while len(begun) < 3 and time.monotonic() < until:
        time.sleep(0.001)
    assert begun == [0, 8, 16]
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mtp-rows")]


def test_position_is_read_when_the_first_batch_is_asked_for(cache: Path, corpus: Path) -> None:
    module = build(cache, corpus)
    loader = module.train_dataloader()
    module.advance(16)
    assert_equal(list(itertools.islice(loader, 1)), take(build(cache, corpus), 3)[2:])


def test_batch_size_may_change_between_runs(cache: Path, corpus: Path) -> None:
    whole = torch.cat([batch["tokens"] for batch in take(build(cache, corpus), 6)])
    module = build(cache, corpus, batch={"global_batch_size": 3, "micro_batch_size": 3})
    module.load_state_dict({**module.state_dict(), "rows_consumed": 8})
    assert torch.equal(torch.cat([batch["tokens"] for batch in take(module, 4)]), whole[8:20])


def test_loaders_leave_the_random_numbers_of_the_run_alone(cache: Path, corpus: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    module = build(cache, corpus)
    take(module, 2)
    list(module.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_changes_the_order(cache: Path, corpus: Path) -> None:
    one, other = take(build(cache, corpus), 1)[0], take(build(cache, corpus, run={"seed": 6}), 1)[0]
    assert not torch.equal(one["tokens"], other["tokens"])


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"run": {"seed": 6}}, r"with: seed = 6 in the recipe; found seed = 5 in the checkpoint"),
        ({"data": {"seq_len": 9}}, r"seq_len = 9 in the recipe; found seq_len = 8"),
        ({"heads": {"num_offsets": 2}}, r"num_offsets = 2 in the recipe; found num_offsets = 3"),
        (
            {"run": {"seed": 6}, "heads": {"num_offsets": 2}},
            r"num_offsets = 2, seed = 6 in the recipe; found num_offsets = 3, seed = 5",
        ),
    ],
)
def test_state_of_another_recipe_is_refused(cache: Path, corpus: Path, changes: dict[str, Any], found: str) -> None:
    state = build(cache, corpus).state_dict()
    with pytest.raises(CheckpointError, match=found):
        build(cache, corpus, **changes).load_state_dict(state)


def test_state_of_other_shards_is_refused_with_both_fingerprints(tmp_path: Path, cache: Path, corpus: Path) -> None:
    write_corpus(tmp_path / "other", seed=3)
    prepare_shards(tiny_recipe(cache, tmp_path / "other"))
    one, other = build(cache, corpus), build(cache, tmp_path / "other")
    prints = [module.state_dict()["fingerprint"] for module in (other, one)]
    with pytest.raises(
        CheckpointError, match=f"fingerprint = {prints[0]} in the recipe; found fingerprint = {prints[1]}"
    ):
        other.load_state_dict(one.state_dict())


@pytest.mark.parametrize("rows", [None, -1, 2.5, "8", True])
def test_state_without_a_count_is_refused(cache: Path, corpus: Path, rows: object) -> None:
    module = build(cache, corpus)
    with pytest.raises(CheckpointError, match="rows_consumed of a checkpoint must be a count"):
        module.load_state_dict({**module.state_dict(), "rows_consumed": rows})


def test_empty_state_is_refused(cache: Path, corpus: Path) -> None:
    with pytest.raises(CheckpointError, match="found version = None, fingerprint = None"):
        build(cache, corpus).load_state_dict({})


def test_validation_rows_are_spread_over_the_held_out_split(cache: Path, corpus: Path) -> None:
    rows = open_rows(tiny_recipe(cache, corpus), "validation")
    loader = build(cache, corpus).val_dataloader()
    batches = list(loader)
    assert [len(batch["tokens"]) for batch in batches] == [4, 4, 2]
    assert len(loader) == 3
    chosen = [row * len(rows) // 10 for row in range(10)]
    assert len(set(chosen)) == 10
    assert np.array_equal(
        torch.cat([batch["tokens"] for batch in batches]).numpy(), rows.read(np.array(chosen))["tokens"]
    )
    assert_equal(list(loader), batches)


def test_ranks_share_the_validation_rows(cache: Path, corpus: Path) -> None:
    whole = torch.cat([batch["tokens"] for batch in build(cache, corpus).val_dataloader()])
    parts = [build(cache, corpus, rank=rank, world_size=2).val_dataloader() for rank in range(2)]
    assert torch.equal(torch.cat([batch["tokens"] for part in parts for batch in part]), whole)


def test_fewer_validation_rows_than_asked_for_are_all_used_and_said(
    cache: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    available = len(open_rows(tiny_recipe(cache, corpus), "validation"))
    module = build(cache, corpus, run={"validation_samples": 10_000})
    assert sum(len(batch["tokens"]) for batch in module.val_dataloader()) == available
    assert f"validating on {available} rows, not 10,000: {available} are held out" in capsys.readouterr().err


def test_ranks_get_equally_many_validation_rows(cache: Path, corpus: Path) -> None:
    parts = [build(cache, corpus, rank=rank, world_size=4).val_dataloader() for rank in range(4)]
    assert [sum(len(batch["tokens"]) for batch in part) for part in parts] == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("world_size", "changes", "found"),
    [
        (
            3,
            {},
            r"batch\.global_batch_size must be a multiple of the number of ranks, 3; found 8\. "
            r"Set batch\.global_batch_size=9",
        ),
        (
            1,
            {"batch": {"global_batch_size": 4096}},
            r"must have the batch\.global_batch_size = 4,096 rows of one step; found \d+ rows of 11 tokens",
        ),
        (8, {"run": {"validation_samples": 7}}, r"at least one row for each of 8 ranks; found 7 asked for"),
        (1, {"data": {"seq_len": 100_000}}, r"must have the T \+ n = 100003 tokens of one row"),
        (1, {"model": {"vocab_size": 100}}, r"below model\.vocab_size = 100; found id 256"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_at_setup(
    cache: Path, corpus: Path, world_size: int, changes: dict[str, Any], found: str
) -> None:
    with pytest.raises(DataError, match=found):
        build(cache, corpus, world_size=world_size, **changes)


def test_damaged_shard_is_refused_at_setup(cache: Path, corpus: Path) -> None:
    shard = next(cache.glob("data-*/train/*.tar"))
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"found 1,000 bytes\. Copy"):
        build(cache, corpus)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_token_that_the_model_lacks_stops_the_loader(cache: Path, corpus: Path, workers: int) -> None:
    folder = next(cache.iterdir())
    shard = next(folder.glob("train/*.tar"))
    data = bytearray(shard.read_bytes())
    data[512:1512] = np.full(500, 300, "<u2").tobytes()
    shard.write_bytes(data)
    forge(folder)  # a manifest that does not know of it
    module = build(cache, corpus, data={"workers": workers})
    place = r"train/\d+\.tar, member 0, token \d+, byte [\d,]+"
    with pytest.raises(DataError, match=rf"vocab_size = 257; found id 300 at .*{place}\. ") as caught:
        take(module, 50)
    at = int(re.findall(r"byte (\d+)", caught.value.found.replace(",", ""))[-1])
    assert data[at : at + 2] == (300).to_bytes(2, "little")
    assert str(folder) in caught.value.found


class Recorder(pl.LightningModule):
    """Count steps the way the training module does, and keep what was fed."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fed: list[Batch] = []
        self.validated: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        assert isinstance(optimizer, pl.core.optimizer.LightningOptimizer)
        self.manual_backward(self.weight * 1.0)
        optimizer.step()
        self.fed.append(batch)
        self.trainer.datamodule.advance(8)  # type: ignore[attr-defined]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(len(batch["tokens"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(cache: Path, corpus: Path, steps: int, *, resume: str | None = None) -> tuple[Recorder, pl.Trainer]:
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        default_root_dir=cache,
    )
    recorder = Recorder()
    trainer.fit(recorder, datamodule=MtpDataModule(tiny_recipe(cache, corpus)), ckpt_path=resume, weights_only=False)
    return recorder, trainer


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning 2.6 with torch 2.13
def test_lightning_feeds_and_resumes_without_loss_or_repetition(tmp_path: Path, cache: Path, corpus: Path) -> None:
    whole = take(build(cache, corpus), 7)
    first, trainer = fit(cache, corpus, 4)
    assert first.validated == [4, 4, 2] * 2
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    second, _ = fit(cache, corpus, 7, resume=str(tmp_path / "x.ckpt"))
    assert_equal(first.fed, whole[:4])
    assert_equal(second.fed, whole[4:])
