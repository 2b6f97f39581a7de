"""Streams of plain WebDataset tars, and the traps that webdataset's own pipelines have."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import pickle
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.data.loading.factory import open_rows
from mtp_lightning.data.loading.stream_documents import TarDocuments, tars_of
from mtp_lightning.errors import CheckpointError, DataError
from tests.data.corpora import END, tiny_recipe

WIDTH = 11  # T = 8, n = 3


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def text_of(tar: int, document: int) -> str:
    return f"{tar:02d}.{document:02d} " * 4


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Eight tars of unequal length, and one that is held out."""
    for tar in range(8):
        texts = {f"{tar:02d}{k:03d}.txt": text_of(tar, k).encode() for k in range(3 + 5 * tar)}
        write_tar(tmp_path / f"train/{tar:02d}.tar", texts)
    write_tar(tmp_path / "held/0.tar", {f"{k}.txt": text_of(99, k).encode() for k in range(20)})
    return tmp_path


def build(
    root: Path, *, rank: int = 0, world_size: int = 1, train: str = "train/*.tar", **changes: Any
) -> MtpDataModule:
    stream = {"train": [str(root / train)], "validation": [str(root / "held/0.tar")], **changes.pop("stream", {})}
    data = {"kind": "webdataset_stream", "stream": stream, **changes.pop("data", {})}
    module = MtpDataModule(tiny_recipe(root / "cache", root, data=data, **changes))
    module.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)  # type: ignore[assignment]
    module.prepare_data()
    module.setup("fit")
    return module


def take(module: MtpDataModule, steps: int) -> list[dict[str, torch.Tensor]]:
    return list(itertools.islice(module.train_dataloader(), steps))


def tars_read(batches: list[dict[str, torch.Tensor]]) -> Counter[str]:
    """Count the documents whose beginning was read, by tar."""
    text = b"".join(bytes(row[:8]) for batch in batches for row in batch["tokens"].clamp(max=255).tolist())
    return Counter(word[:2].decode() for word in text.split() if len(word) == 5 and word[2:3] == b".")


def test_rows_are_the_documents_one_after_another(tars: Path) -> None:
    batch = take(build(tars, train="train/03.tar"), 3)
    rows = torch.cat([own["tokens"] for own in batch])
    assert rows.shape == (24, WIDTH)
    assert rows.dtype == torch.int64
    documents = [[*text_of(3, k).encode(), END] for k in range(18)]
    stream = list(itertools.chain(*documents, *documents))
    owners = [number for number, document in enumerate(documents) for _ in document]
    for number, row in enumerate(rows.tolist()):
        assert row == stream[8 * number : 8 * number + WIDTH]
    found = torch.cat([own["documents"] for own in batch]).tolist()
    assert found == [
        [owner - owners[8 * number] for owner in owners[8 * number : 8 * number + WIDTH]] for number in range(24)
    ]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_ranks_and_their_loader_processes_read_tars_of_their_own(tars: Path, workers: int) -> None:
    """Spawned loader processes know of no rank: webdataset's own splitter would give each all the data."""
    readers = max(1, workers)
    seen = []
    for rank in range(2):
        batches = take(build(tars, rank=rank, world_size=2, data={"workers": workers}), 120)
        rows = torch.cat([batch["tokens"] for batch in batches])
        seen += [set(tars_read([{"tokens": rows[reader::readers]}])) for reader in range(readers)]
    stems = [f"{number:02d}" for number in range(8)]
    assert seen == [set(stems[part :: 2 * readers]) for part in range(2 * readers)]


def test_no_rank_ends_before_the_others_however_unequal_their_tars(tars: Path) -> None:
    lengths = {len(take(build(tars, rank=rank, world_size=8), 60)) for rank in range(8)}
    assert lengths == {60}


def test_environment_of_webdataset_changes_nothing(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = take(build(tars), 20)
    for name, value in {"WDS_SEED": "7", "WDS_EPOCH": "3", "RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(before, take(build(tars), 20), strict=True))


def test_order_of_tars_changes_with_seed_epoch_and_start(tars: Path) -> None:
    def order(module: MtpDataModule, steps: int = 200) -> list[str]:
        text = b"".join(bytes(row[:8]) for b in take(module, steps) for row in b["tokens"].clamp(max=255).tolist())
        return [tar for tar, _ in itertools.groupby(word[:2].decode() for word in text.split() if word[2:3] == b".")]

    first = order(build(tars))
    assert len(first) > 16
    assert first == order(build(tars))
    assert first[:8] != first[8:16]
    assert first[:8] != order(build(tars, run={"seed": 6}))[:8]
    later = build(tars)
    later.advance(80)
    assert first[:8] != order(later)[:8]


def test_resume_is_said_not_to_be_exact(tars: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = build(tars)
    assert "streaming 8 tars; resume is not exact" in capsys.readouterr().err
    module.advance(16)
    state = json.loads(json.dumps(module.state_dict()))
    resumed = build(tars)
    resumed.load_state_dict(state)
    assert resumed.rows_consumed == 16
    with pytest.raises(CheckpointError, match="found fingerprint = stream"):
        build(tars, train="train/0[0-6].tar").load_state_dict(state)


def test_kinds_of_samples(tmp_path: Path) -> None:
    ids = np.array([104, 105, END], dtype="<u2")
    buffer = io.BytesIO()
    np.save(buffer, ids.astype(np.int64))
    members = {
        "a.json": json.dumps({"body": "hi", "other": 3}).encode(),
        "b.txt": b"hi",
        "b.cls": b"7",
        "c.tok": ids.tobytes(),
        "d.npy": buffer.getvalue(),
        "e.txt": b"",
    }
    write_tar(tmp_path / "train/0.tar", members)
    write_tar(tmp_path / "held/0.tar", {"0.txt": b"x" * 30})
    rows = torch.cat([batch["tokens"] for batch in take(build(tmp_path, stream={"text_field": "body"}), 1)])
    assert rows[0].tolist() == [104, 105, END] * 3 + [104, 105]


def read_member(root: Path, members: dict[str, bytes], member: str | None) -> list[list[int]]:
    tar = str(write_tar(root / "0.tar", members))
    stream = {"train": [tar], "validation": [tar], "member": member}
    recipe = tiny_recipe(root / "cache", root, data={"kind": "webdataset_stream", "stream": stream})
    return [tokens.tolist() for tokens in TarDocuments.of(recipe).read(tar)]


@pytest.mark.parametrize(
    ("members", "member"),
    [
        ({"0000.txt": b"hi", "0000.json": b"{}"}, "txt"),
        ({"0000.txt": b"no", "0000.json": b'{"text": "hi"}'}, ".JSON"),
        ({"a/0000.seg.txt": b"hi", "a/0000.other.txt": b"no"}, "seg.txt"),
        ({"0000.txt.gz": gzip.compress(b"hi")}, None),
        ({"0000.txt.bz2": bz2.compress(b"hi"), "0000.jpg": b"x"}, None),
        ({"0000.json.xz": lzma.compress(b'{"text": "hi"}')}, None),
        ({"0000.seg.txt.gz": gzip.compress(b"hi"), "0000.txt": b"no"}, "seg.txt.gz"),
        ({"0000.txt": "hi".encode("utf-16")}, None),
        ({"0000.transcript": b"hi", "0000.txt": b"no"}, "transcript"),
        ({"0000.__key__": b"0000", "0000.__url__": b"x", "0000.txt": b"hi"}, None),
    ],
)
def test_the_member_that_is_the_document_can_be_named(
    tmp_path: Path, members: dict[str, bytes], member: str | None
) -> None:
    assert read_member(tmp_path, members, member) == [[104, 105, END]]


@pytest.mark.parametrize(
    ("members", "member", "found"),
    [
        ({"a.txt": b"x", "a.json": b"{}"}, None, r"found \.txt, json\. .*data\.stream\.member=txt"),
        ({"a.b.txt": b"x"}, None, r"found \.b\.txt\. .*data\.stream\.member=b\.txt"),
        ({"a.txt": b"x"}, "seg.txt", r"must be seg\.txt; found \.txt"),
        ({"a.txt.gz": gzip.compress(b"x" * 99)[:-9]}, None, r"a\.txt\.gz must be readable to its end; found EOFError"),
        ({"a.pkl": b"x"}, "pkl", "no pickle"),
    ],
)
def test_a_member_that_is_not_there_is_told(
    tmp_path: Path, members: dict[str, bytes], member: str | None, found: str
) -> None:
    with pytest.raises(DataError, match=found):
        read_member(tmp_path, members, member)


def npy_of_objects() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


class Bomb:
    """Fails the test when it is unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("unpickled",))


@pytest.mark.parametrize(
    ("members", "found"),
    [
        *(({"a.txt": b"x", f"a.{kind}": pickle.dumps(Bomb())}, rf"a\.{kind} must be no pickle, which") for kind in
          ("pyd", "pkl", "pickle", "pth")),
        ({"a.npy": npy_of_objects()}, r"a\.npy must be an array of whole numbers, without pickled objects; found"),
        ({"a.npy": b"\x93NUMPY"}, r"a\.npy must be an array of whole numbers"),
        ({"a.b.txt": b"x"}, r"one of \.txt, \.json, \.tok, \.npy right after its key.* found \.b\.txt"),
        ({"a.jpg": b"x"}, r"found \.jpg"),
        ({"a.txt": b"x", "a.json": b"{}"}, r"found \.txt, json"),
        ({"a.txt": b"\xff\xfe\xff"}, r"a\.txt must be UTF-8 text; found UnicodeDecodeError"),
        ({"b.json": b"{"}, r"b\.json must be JSON with the field text; found JSONDecodeError"),
        ({"a.json": b'{"texts": "x"}'}, r"must be JSON with the field text; found KeyError: 'text'"),
        ({"a.json": b'{"text": 5}'}, r"must be text in the field text; found int"),
        ({"a.tok": b"123"}, r"must be uint16 ids, 2 bytes each .*; found 3 bytes"),
        ({"ok.txt": b"fine", "a.tok": np.array([5, 6, 300], "<u2").tobytes()},
         r"below model\.vocab_size = 257; found id 300 at .*0\.tar, sample a, token 2\. Raise"),
        ({}, r"tars must hold documents; found none in .*0\.tar"),
        ({"a.txt": b""}, r"tars must hold documents; found none in .*0\.tar"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("workers", [0])
def test_what_cannot_be_read_is_named(tmp_path: Path, members: dict[str, bytes], found: str, workers: int) -> None:
    write_tar(tmp_path / "train/0.tar", members)
    write_tar(tmp_path / "held/0.tar", {"0.txt": b"x" * 30})
    with pytest.raises(DataError, match=found):
        take(build(tmp_path, data={"workers": workers}), 1)


@pytest.mark.slow
def test_errors_of_loader_processes_arrive_as_what_they_are(tmp_path: Path) -> None:
    write_tar(tmp_path / "train/0.tar", {"a.pyd": pickle.dumps(Bomb())})
    write_tar(tmp_path / "held/0.tar", {"0.txt": b"x" * 30})
    with pytest.raises(DataError, match="must be no pickle"):
        take(build(tmp_path, data={"workers": 1}), 1)


def test_tar_cut_short_is_named(tars: Path) -> None:
    path = tars / "train/07.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"07\.tar must be a whole tar of WebDataset samples; found ReadError"):
        take(build(tars, train="train/07.tar"), 2)


def test_fewer_tars_than_readers_are_refused_at_setup(tars: Path) -> None:
    with pytest.raises(DataError, match=r"for each of 3 ranks x 3 loader processes; found 8 tars\. Split"):
        build(tars, rank=0, world_size=3, data={"workers": 3}, batch={"global_batch_size": 9, "micro_batch_size": 3})
    with pytest.raises(DataError, match="nowhere"):
        build(tars, train="nowhere/*.tar")


def test_held_out_rows_are_kept_and_the_same_every_time(tars: Path) -> None:
    module = build(tars)
    held_out = open_rows(module.recipe, "validation")
    assert len(held_out) == 10  # run.validation_samples
    first, second = ([b["tokens"] for b in module.val_dataloader()] for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert first[0][0].tolist() == [*text_of(99, 0).encode()][:WIDTH]
    with pytest.raises(DataError, match="rows must be numbered"):
        open_rows(module.recipe, "train")
    (tars / "held/0.tar").unlink()
    write_tar(tars / "held/0.tar", {"0.txt": b"short"})
    with pytest.raises(DataError, match=r"must have the T \+ n = 11 tokens of one row"):
        build(tars)


def test_numbers_in_names_are_written_out(tmp_path: Path) -> None:
    assert tars_of(["s3://bucket/{1..3}.tar"]) == [f"s3://bucket/{k}.tar" for k in (1, 2, 3)]
    write_tar(tmp_path / "00.tar", {"a.txt": b"x"})
    assert tars_of([str(tmp_path / "{00..00}.tar"), str(tmp_path / "*.tar")]) == [str(tmp_path / "00.tar")]


def test_tars_behind_urls_are_streamed(tars: Path) -> None:
    whole = take(build(tars, train="train/02.tar"), 4)
    module = build(tars, stream={"train": [f"file://{tars}/train/02.tar"]})
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(whole, take(module, 4), strict=True))
