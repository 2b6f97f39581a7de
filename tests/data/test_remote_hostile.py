"""A server that is hostile, or broken: nothing here is touched, and no more is taken than was promised."""

import functools
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from mtp_lightning.data.loading.corpus import prepare_named
from mtp_lightning.data.loading.factory import open_rows
from mtp_lightning.data.shards import remote
from mtp_lightning.data.shards.cache import ShardCache
from mtp_lightning.data.shards.manifest import Shard, fingerprint_of, load_manifest
from mtp_lightning.data.shards.remote import mirror
from mtp_lightning.errors import DataError
from tests.data.corpora import tiny_recipe
from tests.data.shard_damage import damage_folder

MOST = 1 << 20


class Handler(http.server.BaseHTTPRequestHandler):
    """Give what `answer` gives for a path, in pieces; say its size only if it is known."""

    answer: Callable[[str], tuple[int | None, Iterator[bytes]]]

    def do_HEAD(self) -> None:
        self.begin()

    def do_GET(self) -> None:
        try:
            for piece in self.begin():
                self.wfile.write(piece)
                self.server.sent_bytes += len(piece)  # type: ignore[attr-defined]
        except OSError:  # who asks has gone
            self.close_connection = True

    def begin(self) -> Iterator[bytes]:
        num_bytes, pieces = self.server.answer(self.path)  # type: ignore[attr-defined]
        self.send_response(200)
        if num_bytes is not None:
            self.send_header("Content-Length", str(num_bytes))
        self.end_headers()
        return pieces

    def log_message(self, *args: Any) -> None:
        return


def endless() -> Iterator[bytes]:
    for _ in range(4096):  # 256 MiB
        yield bytes(1 << 16)


@pytest.fixture
def server(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Serve the folder, except for what is in `lies`: a path, and the answer to it."""
    monkeypatch.setattr(remote, "PAUSE_S", 0.0)

    def answer(path: str) -> tuple[int | None, Iterator[bytes]]:
        if path in server.lies:  # type: ignore[attr-defined]
            return server.lies[path]()  # type: ignore[attr-defined,no-any-return]
        content = (shards / path.lstrip("/")).read_bytes()
        return len(content), iter([content])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.answer, server.lies, server.sent_bytes = answer, {}, 0  # type: ignore[attr-defined]
        server.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
        thread = threading.Thread(target=functools.partial(server.serve_forever, 0.02), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("escape", ["{outside}/x", "../../../../outside/x", "x/../../../../../outside/x"])
def test_digest_that_is_a_path_deletes_and_writes_nothing(
    tmp_path: Path, shards: Path, server: Any, escape: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for suffix in ("tar", "partial"):
        (outside / f"x.{suffix}").write_text("precious")
    content = json.loads((shards / "manifest.json").read_text())
    del content["fingerprint"]
    for shard in content["shards"]:
        shard["sha256"] = escape.format(outside=outside)
    signed = json.dumps({"fingerprint": fingerprint_of(content), **content}).encode()
    server.lies["/manifest.json"] = lambda: (len(signed), iter([signed]))
    recipe = tiny_recipe(tmp_path / "cache", tmp_path, data={"shards": server.url})
    with pytest.raises(DataError, match=r"shards\.0\.sha256: String should match"):
        prepare_named(recipe, server.url)
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"x.tar": "precious", "x.partial": "precious"}


def cache_of(server: Any, tmp_path: Path) -> tuple[ShardCache, Shard]:
    manifest = load_manifest(mirror(server.url, tmp_path / "cache"))
    return ShardCache(server.url, tmp_path / "cache/shards", limit_bytes=MOST), manifest.shards[0]


LENGTHS = [
    # what the server says, what it sends, what the error says was received
    (None, lambda size: bytes(size + 5000), "{more} bytes received, and no end"),
    (lambda size: size + 5000, lambda size: bytes(size + 5000), "{5000 more} bytes"),
    (None, lambda size: b"", "0 bytes and sha256 e3b0c44"),
    (None, lambda size: bytes(size - 1), "{less} bytes and sha256"),
    (lambda size: size - 512, lambda size: bytes(size - 512), "{512 less} bytes and sha256"),
    (None, lambda size: bytes(size), "{same} bytes and sha256"),
]


@pytest.mark.parametrize(("said", "sent", "found"), LENGTHS)
def test_shard_of_another_length_is_named_and_removed(
    tmp_path: Path, server: Any, said: Any, sent: Any, found: str
) -> None:
    cache, shard = cache_of(server, tmp_path)
    size = shard.num_bytes
    server.lies[f"/{shard.name}"] = lambda: (None if said is None else said(size), iter([sent(size)]))
    numbers = {"more": 1, "5000 more": 5000, "less": -1, "512 less": -512, "same": 0}
    for name, number in numbers.items():
        found = found.replace(f"{{{name}}}", f"{size + number:,}")
    with pytest.raises(DataError, match=rf"{server.url}/{shard.name} must have .*{size:,} bytes.*; found {found}"):
        cache.open(shard)
    assert [path.name for path in (tmp_path / "cache/shards").iterdir()] == ["lock"]


def test_endless_shard_is_cut_off_at_once(tmp_path: Path, server: Any) -> None:
    cache, shard = cache_of(server, tmp_path)
    server.lies[f"/{shard.name}"] = lambda: (None, endless())
    with pytest.raises(DataError, match="bytes received, and no end"):
        cache.open(shard)
    assert server.sent_bytes < 100 << 20, "what sockets hold, three times"
    assert [path.name for path in (tmp_path / "cache/shards").iterdir()] == ["lock"]


@pytest.mark.parametrize("said", [None, 10**12])
@pytest.mark.parametrize(
    ("name", "bound"), [("index.npz", "MOST_INDEX_BYTES"), ("manifest.json", "MOST_MANIFEST_BYTES")]
)
def test_index_and_manifest_without_end_are_cut_off(
    tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch, name: str, bound: str, said: int | None
) -> None:
    monkeypatch.setattr(remote, bound, MOST)
    server.lies[f"/{name}"] = lambda: (said, endless())
    with pytest.raises(DataError, match=rf"{name} must have at most {MOST:,} bytes; found 1,0"):
        mirror(server.url, tmp_path / "cache")
    assert server.sent_bytes < 100 << 20


def test_shard_that_no_cache_holds_is_refused_at_once(tmp_path: Path, server: Any) -> None:
    cache, shard = cache_of(server, tmp_path)
    cache.limit_bytes = shard.num_bytes - 1
    with pytest.raises(DataError, match=r"must have room for .*Raise data\.cache_gib"):
        cache.open(shard)


def test_manifest_behind_a_url_says_control_characters_as_escapes(tmp_path: Path, shards: Path, server: Any) -> None:
    content = json.loads((shards / "manifest.json").read_text())
    content["shards"][0]["name"] = "train/\x1b]0;owned\x07.tar"
    del content["fingerprint"]
    signed = json.dumps({"fingerprint": fingerprint_of(content), **content}).encode()
    server.lies["/manifest.json"] = lambda: (len(signed), iter([signed]))
    with pytest.raises(DataError) as caught:
        load_manifest(mirror(server.url, tmp_path / "cache"))
    assert r"\x1b]0;owned\x07" in str(caught.value)
    assert str(caught.value).isprintable()


def test_index_of_claims_behind_a_url_is_refused(tmp_path: Path, shards: Path, server: Any) -> None:
    arrays = dict(np.load(shards / "index.npz"))
    arrays["num_tokens"] += 10**11
    np.savez(shards / "index.npz", allow_pickle=False, **arrays)
    recipe = tiny_recipe(tmp_path / "cache", tmp_path, data={"shards": server.url})
    prepare_named(recipe, server.url)
    with pytest.raises(DataError, match=r"in the index of .* must be as in the manifest"):
        open_rows(recipe, "train")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 108), marks=pytest.mark.slow)])
def test_damaged_folders_behind_a_url_are_refused(tmp_path: Path, shards: Path, server: Any, seeds: range) -> None:
    refusals = []
    for seed in seeds:
        folder = tmp_path / f"served/{seed}"
        shutil.copytree(shards, folder)
        what = damage_folder(folder, Random(seed), keeps_files=True)
        server.answer = lambda path: (None, iter([(tmp_path / "served" / path.lstrip("/")).read_bytes()]))
        recipe = tiny_recipe(tmp_path / "cache", tmp_path, data={"shards": f"{server.url}/{seed}"})
        try:
            prepare_named(recipe, f"{server.url}/{seed}")
            for split in ("train", "validation"):
                rows = open_rows(recipe, split)
                rows.read(np.arange(len(rows)))
        except DataError as error:
            refusals.append((what, str(error)))
    assert all(said.replace("\n", "").isprintable() for _, said in refusals)
    assert len(refusals) > 0.3 * len(seeds)
