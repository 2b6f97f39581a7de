"""Shards behind URLs: the same rows in the same order, through a cache that stays within its bound."""

import functools
import http.server
import itertools
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.data.sampling.windows import WindowDataset
from mtp_lightning.data.shards import cache as shard_cache
from mtp_lightning.data.shards import remote
from mtp_lightning.data.shards.cache import GIB, ShardCache
from mtp_lightning.data.shards.manifest import Shard, load_manifest
from mtp_lightning.data.shards.remote import mirror
from mtp_lightning.errors import DataError
from tests.data.corpora import build_tiny, tiny_recipe, write_corpus

BIG = 10**9


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serve a folder, count what is asked for, and fail as often as told."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        if self.server.failures:  # type: ignore[attr-defined]
            self.server.failures -= 1  # type: ignore[attr-defined]
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, *args: Any) -> None:
        return


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus", num_documents=120)
    manifest = build_tiny([str(tmp_path / "corpus")], tmp_path / "shards", shard_bytes=3000)
    assert len(manifest.shards_of("train")) >= 8
    return tmp_path / "shards"


@pytest.fixture
def server(folder: Path) -> Iterator[Any]:
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.asked, server.failures = [], 0  # type: ignore[attr-defined]
        server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_S", 0.01)


def module_of(tmp_path: Path, shards: str, *, rank: int = 0, world_size: int = 1, **data: Any) -> MtpDataModule:
    module = MtpDataModule(tiny_recipe(tmp_path / "cache", tmp_path, data={"shards": shards, **data}))
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
    module.prepare_data()
    module.setup("fit")
    return module


def take(module: MtpDataModule, steps: int) -> torch.Tensor:
    return torch.cat([batch["tokens"] for batch in itertools.islice(module.train_dataloader(), steps)])


def cached(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache/remote/shards").glob("*.tar"))


def cached_bytes(tmp_path: Path) -> int:
    return sum(size_or_none(path) or 0 for path in cached(tmp_path))


def size_or_none(path: Path) -> int | None:
    """Size of a file that may be evicted at any moment."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


@pytest.mark.parametrize("order", ["rows", "shards"])
def test_rows_from_a_url_are_the_rows_of_the_folder(tmp_path: Path, folder: Path, server: Any, order: str) -> None:
    local = module_of(tmp_path, str(folder), shuffle=order, shuffle_shards=2)
    far = module_of(tmp_path, server.url, shuffle=order, shuffle_shards=2)
    assert torch.equal(take(far, 30), take(local, 30))
    assert far.state_dict() == local.state_dict()
    held_out = [batch["tokens"] for batch in far.val_dataloader()]
    assert all(map(torch.equal, held_out, [batch["tokens"] for batch in local.val_dataloader()]))
    tars = [path for path in server.asked if path.endswith(".tar")]
    assert len(tars) == len(set(tars)), "each shard is fetched once"


@pytest.mark.parametrize("workers", [(1, 0), pytest.param((1, 1), marks=pytest.mark.slow)])
def test_loader_processes_and_ranks_read_from_the_same_cache(
    tmp_path: Path, folder: Path, server: Any, workers: tuple[int, int]
) -> None:
    shape: dict[str, Any] = {"shuffle": "shards", "shuffle_shards": 2}
    whole = take(module_of(tmp_path, str(folder), **shape), 6)
    parts = [
        take(module_of(tmp_path, server.url, rank=rank, world_size=2, workers=workers[rank], **shape), 6).reshape(
            6, 4, -1
        )
        for rank in range(2)
    ]
    assert torch.equal(torch.cat(parts, dim=1).reshape(whole.shape), whole)


def test_fsspec_reads_what_is_no_website(tmp_path: Path, folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in folder.rglob("*.*"):
        memory.pipe_file(f"/far/{path.relative_to(folder)}", path.read_bytes())
    whole = take(module_of(tmp_path, str(folder)), 8)
    assert torch.equal(take(module_of(tmp_path, "memory://far/"), 8), whole)
    assert torch.equal(take(module_of(tmp_path, f"file://{folder}"), 8), whole)


def test_a_file_that_vanishes_while_the_cache_is_counted_does_no_harm(tmp_path: Path, folder: Path) -> None:
    """A link to nothing is what another process's file looks like that is listed and then renamed."""
    shards = tmp_path / "cache/remote/shards"
    shards.mkdir(parents=True)
    for name in ("renamed.partial", "removed.tar"):
        (shards / name).symlink_to(tmp_path / "gone")
    whole = take(module_of(tmp_path, str(folder)), 8)
    assert torch.equal(take(module_of(tmp_path, f"file://{folder}"), 8), whole)


def test_cache_stays_within_its_bound_and_reads_on(tmp_path: Path, folder: Path, server: Any) -> None:
    manifest = load_manifest(folder)
    held_out = sum(shard.num_bytes for shard in manifest.shards_of("validation"))
    limit = held_out + sum(sorted(shard.num_bytes for shard in manifest.shards_of("train"))[-4:])
    assert limit < sum(shard.num_bytes for shard in manifest.shards)
    shape: dict[str, Any] = {"shuffle": "shards", "shuffle_shards": 2}
    whole = take(module_of(tmp_path, str(folder), **shape), 100)
    module = module_of(tmp_path, server.url, cache_gib=limit / GIB, **shape)
    num_rows, worst = len(module.training_rows), 0
    read = []
    for batch in itertools.islice(module.train_dataloader(), 100):
        read.append(batch["tokens"])
        worst = max(worst, cached_bytes(tmp_path))
    assert torch.equal(torch.cat(read), whole)
    assert worst <= limit
    tars = [path for path in server.asked if path.endswith(".tar")]
    epochs = 100 * 8 / num_rows
    assert len(set(tars)) == len(manifest.shards_of("train"))
    assert len(tars) <= (epochs + 1) * len(manifest.shards_of("train")), "it does not go round in circles"


def test_cache_too_small_for_the_order_is_refused_with_what_to_set(tmp_path: Path, folder: Path, server: Any) -> None:
    total = sum(shard.num_bytes for shard in load_manifest(folder).shards)
    with pytest.raises(
        DataError, match=r"shuffle=rows\); found .* Set data\.cache_gib=\S+, or data\.shuffle=shards"
    ) as caught:
        module_of(tmp_path, server.url, cache_gib=0.7 * total / GIB, shuffle_shards=1)
    wanted = caught.value.hint.partition("cache_gib=")[2].partition(",")[0]
    assert 1 <= float(wanted) * GIB / total < 1.02
    with pytest.raises(DataError, match=r"Set data\.cache_gib=\S+, or lower data\.shuffle_shards"):
        module_of(tmp_path, server.url, cache_gib=0.3 * total / GIB, shuffle="shards", shuffle_shards=8)


def test_other_order_is_another_run(tmp_path: Path, folder: Path) -> None:
    state = module_of(tmp_path, str(folder), shuffle="shards", shuffle_shards=2).state_dict()
    for other in ({"shuffle": "rows"}, {"shuffle": "shards", "shuffle_shards": 3}):
        with pytest.raises(Exception, match=r"order = .* in the recipe; found .*order = shards in groups of 2"):
            module_of(tmp_path, str(folder), **other).load_state_dict(state)


def test_changed_byte_is_found_on_arrival(tmp_path: Path, folder: Path, server: Any) -> None:
    for path in (folder / "train").glob("*.tar"):
        content = bytearray(path.read_bytes())
        content[700] ^= 1
        path.write_bytes(content)
    module = module_of(tmp_path, server.url)
    with pytest.raises(DataError, match=rf"{server.url}/train/\d+\.tar must have .* sha256 .*; found .* sha256"):
        take(module, 1)
    assert not cached(tmp_path)


def test_server_that_stumbles_is_asked_again_and_a_missing_shard_is_named(
    tmp_path: Path, folder: Path, server: Any
) -> None:
    server.failures = 2
    module = module_of(tmp_path, server.url)
    server.failures = 2
    assert len(take(module, 1)) == 8
    module = module_of(tmp_path / "again", server.url)  # the first may still fetch ahead into its own cache
    shutil.rmtree(folder / "train")
    with pytest.raises(DataError, match=rf"{server.url}/train/\d+\.tar must be readable; found FileNotFoundError"):
        take(module, 1)


def test_address_without_shards_and_driver_that_is_missing(tmp_path: Path, server: Any) -> None:
    with pytest.raises(DataError, match=r"/nowhere/index\.npz must be readable; found FileNotFoundError.*Correct"):
        module_of(tmp_path, f"{server.url}/nowhere")
    with pytest.raises(DataError, match=r"gs://bucket/web/index\.npz must be readable by fsspec.*pip install gcsfs"):
        module_of(tmp_path, "gs://bucket/web")


def test_changed_manifest_is_another_data_set(tmp_path: Path, folder: Path, server: Any) -> None:
    state = module_of(tmp_path, server.url).state_dict()
    shutil.rmtree(folder)
    write_corpus(tmp_path / "other", num_documents=120, seed=9)
    build_tiny([str(tmp_path / "other")], folder, shard_bytes=3000)
    with pytest.raises(Exception, match=r"fingerprint = .* in the recipe; found fingerprint"):
        module_of(tmp_path, server.url).load_state_dict(state)


def cache_of(server: Any, tmp_path: Path, limit_bytes: int) -> tuple[ShardCache, list[Shard]]:
    manifest = load_manifest(mirror(server.url, tmp_path / "cache"))
    return ShardCache(server.url, tmp_path / "cache/remote/shards", limit_bytes=limit_bytes), manifest.shards


def test_oldest_shard_goes_first_and_none_that_is_in_use(
    tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, shards = cache_of(server, tmp_path, BIG)
    first, second, third, fourth = shards[:4]
    cache.limit_bytes = first.num_bytes + second.num_bytes + max(third.num_bytes, fourth.num_bytes)
    held = cache.open(first)
    for shard in (second, third, fourth):
        cache.open(shard).close()
    assert {path.stem for path in cached(tmp_path)} == {first.sha256, third.sha256, fourth.sha256}
    monkeypatch.setattr(shard_cache, "ROOM_WAIT_S", 0.3)
    cache.limit_bytes = first.num_bytes
    with pytest.raises(DataError, match=rf"room for {second.num_bytes:,} bytes of .*{second.name}; found .* in use"):
        cache.open(second)
    cache.open(second, free_own=held.close).close()
    assert {path.stem for path in cached(tmp_path)} == {second.sha256}


def test_mapped_shard_is_in_use(tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, shards = cache_of(server, tmp_path, BIG)
    rows = WindowDataset(mirror(server.url, tmp_path / "cache"), "train", seq_len=8, num_offsets=3, cache=cache)
    rows.read(np.array([0]))
    (mapped,) = cached(tmp_path)
    monkeypatch.setattr(shard_cache, "ROOM_WAIT_S", 0.3)
    other, _ = cache_of(server, tmp_path, mapped.stat().st_size)
    with pytest.raises(DataError, match="in use by running processes"):
        other.open(next(shard for shard in shards if shard.sha256 != mapped.stem))
    assert cached(tmp_path) == [mapped]


def fetch_all(url: str, folder: Path, shards: list[Shard], gate: Any) -> None:
    cache = ShardCache(url, folder, limit_bytes=BIG)
    gate.wait()
    for shard in shards:
        cache.open(shard).close()


def test_caches_share_what_one_fetches(tmp_path: Path, server: Any) -> None:
    """Locks are of open files, so caches in threads lock each other out as those of processes do."""
    _, shards = cache_of(server, tmp_path, BIG)
    gate = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        for done in [
            pool.submit(fetch_all, server.url, tmp_path / "cache/remote/shards", shards, gate) for _ in "abcd"
        ]:
            done.result()
    tars = [path for path in server.asked if path.endswith(".tar")]
    assert sorted(tars) == sorted(f"/{shard.name}" for shard in shards)


def test_what_a_killed_process_left_is_made_good(tmp_path: Path, server: Any) -> None:
    cache, shards = cache_of(server, tmp_path, BIG)
    target = tmp_path / "cache/remote/shards"
    target.mkdir(parents=True)
    killed = os.fork()
    if not killed:  # a process that holds a partial file and is killed with it
        (target / f"{shards[0].sha256}.partial").write_bytes(b"half" * 100_000)
        time.sleep(60)
        os._exit(0)
    while not list(target.glob("*.partial")):
        time.sleep(0.01)
    os.kill(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    with cache.open(shards[0]) as file:
        assert len(file.read()) == shards[0].num_bytes
    assert not list(target.glob("*.partial"))
    (target / "gone.partial").write_bytes(bytes(10_000))
    cache.limit_bytes = shards[0].num_bytes + shards[1].num_bytes
    cache.open(shards[1]).close()
    assert not list(target.glob("*.partial"))


def test_shard_that_was_cut_short_in_the_cache_is_fetched_again(tmp_path: Path, server: Any) -> None:
    cache, shards = cache_of(server, tmp_path, BIG)
    cache.open(shards[0]).close()
    (path,) = cached(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with cache.open(shards[0]) as file:
        assert len(file.read()) == shards[0].num_bytes


def test_full_disk_is_named_with_what_is_needed(tmp_path: Path, server: Any, small_disk: Path) -> None:
    _, shards = cache_of(server, tmp_path, BIG)
    (small_disk / "filler").write_bytes(bytes(1496 * 1024))
    cache = ShardCache(server.url, small_disk / "shards", limit_bytes=BIG)
    wanted = rf"{small_disk}/shards must have room for {shards[0].num_bytes:,} bytes of {server.url}/{shards[0].name}"
    with pytest.raises(DataError, match=wanted + r"; found .*\d MiB free there\)\. Make room, lower data\.cache_gib"):
        cache.open(shards[0])
    (small_disk / "filler").unlink()
    cache.open(shards[0]).close()


def test_next_shards_are_fetched_before_they_are_needed(tmp_path: Path, server: Any) -> None:
    cache, shards = cache_of(server, tmp_path, BIG)
    cache.fetch_ahead(shards[:5])
    until = time.monotonic() + 20
    while len(cached(tmp_path)) < 5 and time.monotonic() < until:
        time.sleep(0.01)
    asked = len(server.asked)
    for shard in shards[:5]:
        cache.open(shard).close()
    assert len(server.asked) == asked
