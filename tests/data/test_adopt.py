"""Adopted folders: the tokens and documents that were written, in place, through everything that reads shards."""

import gzip
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtp_lightning.data.adopted import adopt as adopting
from mtp_lightning.data.adopted.adopt import AdoptOptions, adopt
from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.data.sampling.packing import PackedRows, prepare_plan
from mtp_lightning.data.sampling.windows import WindowDataset
from mtp_lightning.data.shards.manifest import AdoptedManifest, load_manifest
from mtp_lightning.data.shards.mapped import ShardMaps
from mtp_lightning.data.shards.stats import lengths_of
from mtp_lightning.data.shards.verify import verify_shards
from mtp_lightning.errors import DataError
from tests.data.corpora import build_tiny, tiny_recipe
from tests.data.foreign import (
    Document,
    some_documents,
    write_index,
    write_litdata,
    write_megatron,
    write_npy,
    write_raw,
)

Write = Callable[[Path, list[Document]], Path]

FORMATS: dict[str, tuple[Write, dict[str, Any]]] = {
    **{f"megatron {t}": (lambda f, d, t=t: write_megatron(f, d, t), {}) for t in ("uint16", "int16", "int32", "int64")},
    **{f"litdata {t}": (lambda f, d, t=t: write_litdata(f, d, t), {}) for t in ("uint16", "uint32", "int32", "int64")},
    "raw uint16": (lambda f, d: write_raw(f, d, "uint16"), {}),
    "raw uint32": (lambda f, d: write_raw(f, d, "uint32"), {"dtype": "uint32"}),
    "raw with a list": (lambda f, d: write_raw(f, d, "uint16", listed=True), {"documents": "index"}),
    **{f"npy {t}": (lambda f, d, t=t: write_npy(f, d, t), {}) for t in ("uint16", "uint32", "int64", ">i4", ">u2")},
    "megatron by eos": (lambda f, d: write_megatron(f, d, "uint16"), {"documents": "eos"}),
    "litdata by eos": (lambda f, d: write_litdata(f, d, "int64"), {"documents": "eos"}),
}


def adopted(folder: Path, out: Path, **changes: Any) -> AdoptedManifest:
    options = {"tokenizer": "byte", "validation_fraction": 0.2, "member_tokens": 100, **changes}
    manifest = adopt(folder, out, AdoptOptions(**options))
    assert isinstance(manifest, AdoptedManifest)
    return manifest


def documents_of(folder: Path) -> list[list[int]]:
    """Read all documents through shards in memory, file after file, first those to train on."""
    found: dict[str, list[list[int]]] = {}
    for split in ("train", "validation"):
        maps = ShardMaps(folder, split)
        for place, shard in enumerate(maps.shards):
            for start, length in zip(*maps[place].document_places(), strict=True):
                tokens = maps[place].tokens(np.array([start]), int(length))[0]
                found.setdefault(shard.name, []).append(tokens.tolist())
    return [document for own in found.values() for document in own]


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_and_documents_are_those_that_were_written(tmp_path: Path, name: str) -> None:
    write, changes = FORMATS[name]
    documents = some_documents()
    manifest = adopted(write(tmp_path / "theirs", documents), tmp_path / "ours", **changes)
    assert documents_of(tmp_path / "ours") == [own.tolist() for own in documents]
    assert lengths_of(tmp_path / "ours", manifest).sum() == sum(own.size for own in documents)
    assert 0.1 < manifest.num_tokens("validation") / sum(own.size for own in documents) <= 0.2
    assert max(len(shard.members) for shard in manifest.shards) > 2
    verify_shards(tmp_path / "ours")
    sizes = sum(path.stat().st_size for path in (tmp_path / "ours").iterdir() if not path.is_symlink())
    assert (tmp_path / "ours/documents.u32").stat().st_size == 4 * len(documents)
    assert sizes < 100_000


@pytest.mark.parametrize("name", ["megatron int32", "litdata int64", "raw uint16", "npy >i4"])
def test_rows_and_packed_rows_are_cut_from_the_tokens_as_they_lie(tmp_path: Path, name: str) -> None:
    write, changes = FORMATS[name]
    folder = write(tmp_path / "theirs", some_documents())
    adopted(folder, tmp_path / "ours", **changes)
    maps = ShardMaps(tmp_path / "ours", "train")
    rows = WindowDataset(tmp_path / "ours", "train", seq_len=32, num_offsets=3)
    batch = rows.read(np.arange(len(rows)))
    row = 0
    for place in range(len(maps.shards)):
        starts, lengths = maps[place].document_places()
        flat = np.concatenate([maps[place].tokens(starts[i : i + 1], int(n))[0] for i, n in enumerate(lengths)])
        owners = np.repeat(np.arange(lengths.size), lengths)
        for begin in range(0, flat.size - 35 + 1, 32):
            assert batch["tokens"][row].tolist() == flat[begin : begin + 35].tolist()
            own = owners[begin : begin + 35]
            assert batch["documents"][row].tolist() == (own - own[0]).tolist()
            row += 1
    assert row == len(rows) > 5
    prepare_plan(tmp_path / "ours", "train", tmp_path, seq_len=32, num_offsets=3)
    packed = PackedRows(tmp_path / "ours", "train", tmp_path, seq_len=32, num_offsets=3)
    read = packed.read(np.arange(len(packed)))
    assert read["tokens"][read["loss_mask"]].size >= maps.manifest.num_tokens("train") - len(maps.shards)


def test_a_mixture_of_adopted_and_built_shards_resumes_where_it_was(tmp_path: Path, corpus: Path) -> None:
    build_tiny([str(corpus)], tmp_path / "built")
    for number, write in enumerate((write_megatron, write_litdata)):
        documents = some_documents(num_documents=1000, seed=number)
        adopted(write(tmp_path / f"{number}", documents, "int32"), tmp_path / f"ours-{number}", member_tokens=5000)
    mixture = {str(tmp_path / "built"): 0.02, str(tmp_path / "ours-0"): 1, str(tmp_path / "ours-1"): 1}
    recipe = tiny_recipe(tmp_path / "cache", corpus, data={"mixture": mixture})
    whole = MtpDataModule(recipe)
    whole.prepare_data()
    whole.setup("fit")
    batches = [batch["tokens"] for batch, _ in zip(whole.train_dataloader(), range(6), strict=False)]
    whole.advance(3 * recipe.batch.global_batch_size)
    resumed = MtpDataModule(recipe)
    resumed.load_state_dict(whole.state_dict())
    for batch, wanted in zip(resumed.train_dataloader(), batches[3:], strict=False):
        assert batch["tokens"].equal(wanted)


def test_jumps_empty_and_overlapping_sequences_are_read_as_the_index_says(tmp_path: Path) -> None:
    tokens = np.arange(100, dtype="<u2")
    tokens.tofile(tmp_path / "x.bin")
    lengths, starts, bounds = [0, 10, 5, 0, 7, 7, 20], [0, 50, 60, 3, 0, 3, 80], [0, 1, 3, 4, 5, 6, 7]
    write_index(tmp_path / "x.idx", 8, lengths, [2 * start for start in starts], bounds)
    adopted(tmp_path, tmp_path.with_name("out"), validation_fraction=0.05)
    wanted = [list(range(50, 65)), list(range(7)), list(range(3, 10)), list(range(80, 100))]
    assert documents_of(tmp_path.with_name("out")) == wanted


def test_documents_by_the_token_that_begins_them_and_a_last_one_without_an_end(tmp_path: Path) -> None:
    np.array([5, 6, 1, 7, 1, 1, 8, 9], dtype="<u2").tofile(tmp_path / "x.npy")
    adopted(tmp_path, tmp_path / "by-bos", documents="bos", begin_of_document=1)
    assert documents_of(tmp_path / "by-bos") == [[5, 6], [1, 7], [1], [1, 8, 9]]
    adopted(tmp_path, tmp_path / "by-eos", tokenizer=None, vocab_size=10, end_of_document=1)
    assert documents_of(tmp_path / "by-eos") == [[5, 6, 1], [7, 1], [1], [8, 9]]


def test_of_one_document_the_end_is_held_out(tmp_path: Path) -> None:
    np.arange(200, dtype="<u2").tofile(tmp_path / "x.npy")
    adopted(tmp_path / "x.npy", tmp_path / "ours")
    assert documents_of(tmp_path / "ours") == [list(range(160)), list(range(160, 200))]


def test_files_that_match_are_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "val"):
        write_litdata(tmp_path / "x" / name, some_documents(), "int32")
    adopted(tmp_path / "x", tmp_path / "ours", validation="val/*")
    assert not capsys.readouterr().out.startswith("val/")
    splits = {(shard.name.split("/")[1], shard.split) for shard in load_manifest(tmp_path / "ours").shards}
    assert splits == {("train", "train"), ("val", "validation")}
    adopted(tmp_path / "x", tmp_path / "other")
    assert "val/chunk-0-0.bin is trained on as all files are; --validation PATTERN" in capsys.readouterr().out


def test_a_prefix_or_a_file_names_one_index(tmp_path: Path) -> None:
    documents = some_documents()
    write_megatron(tmp_path / "x", documents, "uint16")
    write_megatron(tmp_path / "x", documents[:9], "uint16", name="other.v1")
    for number, name in enumerate(("other.v1", "other.v1.idx", "other.v1.bin")):
        adopted(tmp_path / "x" / name, tmp_path / f"{number}")
        assert documents_of(tmp_path / f"{number}") == [own.tolist() for own in documents[:9]]


def test_the_fingerprint_is_of_the_tokens_wherever_they_lie(tmp_path: Path) -> None:
    write_megatron(tmp_path / "x", some_documents(), "uint16")
    first = adopted(tmp_path / "x", tmp_path / "ours")
    (tmp_path / "x").rename(tmp_path / "moved")
    with pytest.raises(DataError, match="no such file") as error:
        WindowDataset(tmp_path / "ours", "train", seq_len=8, num_offsets=1)
    assert "point the link" in (error.value.hint or "")
    (tmp_path / "ours/data").unlink()
    (tmp_path / "ours/data").symlink_to(tmp_path / "moved")
    assert len(WindowDataset(tmp_path / "ours", "train", seq_len=8, num_offsets=1)) > 9
    assert adopted(tmp_path / "moved", tmp_path / "again").fingerprint == first.fingerprint


def test_a_killed_adoption_leaves_nothing_and_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_megatron(tmp_path / "x", some_documents(), "int32")
    wanted = adopted(folder, tmp_path / "whole").fingerprint
    doomed = {"write_index": 0, "publish": 0, "AdoptedMember": 9, "AdoptedShard": 1, "manifest_text": 0}
    for name, after in doomed.items():
        child = os.fork()
        if not child:
            left, own = [None] * after, getattr(adopting, name)

            def last(*arguments: Any, left: list[None] = left, own: Any = own, **named: Any) -> Any:
                return left.pop() or own(*arguments, **named) if left else os.kill(os.getpid(), signal.SIGKILL)

            monkeypatch.setattr(adopting, name, last)
            try:
                adopted(folder, tmp_path / "ours")
            finally:
                os._exit(1)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), name
        assert not (tmp_path / "ours").exists(), name
    assert adopted(folder, tmp_path / "ours").fingerprint == wanted
    verify_shards(tmp_path / "ours")
    assert not list(tmp_path.glob("ours.*"))


def changed(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def whole(value: int, dtype: str = "<i8") -> bytes:
    return np.array(value, dtype).tobytes()


def megatron_damage(at: int, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        write_megatron(folder, some_documents(num_documents=30), "uint16")
        changed(folder / "part_text_document.idx", at, content)

    return damage


def litdata_damage(change: Callable[[Any], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        write_litdata(folder, some_documents(num_documents=30), "int32")
        content = json.loads((folder / "index.json").read_text())
        change(content)
        (folder / "index.json").write_text(json.dumps(content))

    return damage


def bad(folder: Path, *, write: Callable[[Path], Any]) -> None:
    folder.mkdir(exist_ok=True)
    write(folder)


def lied(folder: Path, *, code: int = 8, places: list[int], lengths: list[int], bounds: list[int]) -> None:
    folder.mkdir()
    np.zeros(100, "<u2").tofile(folder / "x.bin")
    write_index(folder / "x.idx", code, lengths, places, bounds)


def with_list(folder: Path, text: bytes) -> None:
    write_raw(folder, some_documents(), "uint16")
    (folder / "a/part-0.csv.gz").write_bytes(gzip.compress(text))


S = 34  # where the lengths begin in the index of Megatron
BAD: dict[str, tuple[Callable[[Path], Any], str, dict[str, Any]]] = {
    "nothing there": (lambda f: None, "no such file", {}),
    "an empty folder": (lambda f: f.mkdir(), "a folder without such files", {}),
    "text": (lambda f: (f.mkdir(), (f / "x.txt").write_text("x")), "a folder without such files", {}),
    "two formats": (
        lambda f: (write_megatron(f, some_documents(), "uint16"), write_npy(f, some_documents(), "uint16")),
        "part_text_document.idx and tokens.npy",
        {},
    ),
    "masks": (
        lambda f: (write_npy(f, some_documents(), "uint16"), (f / "labels_mask_part_0.npy").write_bytes(b"\1")),
        "a mask: labels_mask_part_0.npy",
        {},
    ),
    "wrong magic": (megatron_damage(0, b"MMIDIDY"), "MMIDIDY", {}),
    "old magic": (megatron_damage(0, b"TNTIDX\0\0"), "the older format", {}),
    "version 2": (megatron_damage(9, b"\2"), "version 2", {}),
    "code 9": (megatron_damage(17, b"\11"), "type 9", {}),
    "floats": (megatron_damage(17, b"\7"), "type 7", {}),
    "wider type": (megatron_damage(17, b"\4"), "must lie within", {}),
    "narrower type": (megatron_damage(17, b"\1"), "must lie one after another; found a gap", {}),
    "more sequences": (megatron_damage(18, whole(2**60)), "must have .* bytes", {}),
    "no documents": (megatron_damage(26, whole(0)), "must have .* bytes", {}),
    "negative length": (megatron_damage(S, whole(-1, "<i4")), "found -1 tokens", {}),
    "huge length": (megatron_damage(S, whole(2**31 - 1, "<i4")), "2,147,483,647 tokens", {}),
    "cut index": (
        lambda f: os.truncate(write_megatron(f, some_documents(), "uint16") / "part_text_document.idx", 300),
        "300 bytes",
        {},
    ),
    "cut to a few bytes": (
        lambda f: os.truncate(write_megatron(f, some_documents(), "uint16") / "part_text_document.idx", 7),
        "found 7 bytes",
        {},
    ),
    "cut tokens": (
        lambda f: os.truncate(write_megatron(f, some_documents(), "uint16") / "part_text_document.bin", 300),
        "within the 150 tokens",
        {},
    ),
    "no tokens": (
        lambda f: (write_megatron(f, some_documents(), "uint16") / "part_text_document.bin").unlink(),
        "no such file",
        {},
    ),
    "empty tokens": (
        lambda f: os.truncate(write_megatron(f, some_documents(), "uint16") / "part_text_document.bin", 0),
        "none to read",
        {},
    ),
    "negative place": (lambda f: lied(f, places=[-2], lengths=[5], bounds=[0, 1]), "from byte -2", {}),
    "odd place": (lambda f: lied(f, places=[3], lengths=[5], bounds=[0, 1]), "from byte 3", {}),
    "place beyond": (lambda f: lied(f, places=[2**62], lengths=[5], bounds=[0, 1]), "from byte 4,611,", {}),
    "bounds that fall": (
        lambda f: lied(f, places=[0, 10, 20], lengths=[5, 5, 5], bounds=[0, 2, 1, 3]),
        "others from document 0",
        {},
    ),
    "bounds beyond": (lambda f: lied(f, places=[0, 10], lengths=[5, 5], bounds=[0, 9, 2]), "document 0", {}),
    "last bound": (lambda f: lied(f, places=[0, 10], lengths=[5, 5], bounds=[0, 1]), "0 to 1", {}),
    "a gap in a document": (lambda f: lied(f, places=[0, 12], lengths=[5, 5], bounds=[0, 2]), "a gap before", {}),
    "modes": (
        lambda f: (
            lied(f, places=[0], lengths=[5], bounds=[0, 1]),
            (f / "x.idx").write_bytes((f / "x.idx").read_bytes() + b"\0"),
        ),
        "a mode for each",
        {},
    ),
    "id out of the vocabulary": (
        lambda f: write_megatron(f, some_documents(most=300), "int32"),
        r"found id 300 as int32 at token",
        {},
    ),
    "negative id": (
        lambda f: write_megatron(f, [np.array([5, -7, 3])] * 9, "int32"),
        "id -7 as int32 at token 1",
        {},
    ),
    "an index of something else": (litdata_damage(lambda c: c.pop("config")), "config: Field required", {}),
    "no json": (lambda f: bad(f, write=lambda f: (f / "index.json").write_text("{")), "no JSON", {}),
    "compressed": (litdata_damage(lambda c: c["config"].update(compression="zstd")), "found compressed", {}),
    "encrypted": (litdata_damage(lambda c: c["config"].update(encryption={"a": 1})), "found encrypted", {}),
    "pictures": (litdata_damage(lambda c: c["config"].update(data_format=["pil"])), "found .*pil", {}),
    "two tensors": (
        litdata_damage(lambda c: c["config"].update(data_format=["no_header_tensor:16"] * 2)),
        "flat tensors",
        {},
    ),
    "float tensors": (litdata_damage(lambda c: c["config"].update(data_format=["no_header_tensor:0"])), "type 0", {}),
    "code of letters": (litdata_damage(lambda c: c["config"].update(data_format=["no_header_tensor:x"])), "type x", {}),
    "wide tensors": (
        litdata_damage(lambda c: c["config"].update(data_format=["no_header_tensor:18"])),
        "8 bytes|dim",
        {},
    ),
    "a chunk elsewhere": (litdata_damage(lambda c: c["chunks"][0].update(filename="../x.bin")), "filename", {}),
    "a chunk that is not there": (litdata_damage(lambda c: c["chunks"][0].update(filename="x.bin")), "no such", {}),
    "more items": (litdata_damage(lambda c: c["chunks"][0].update(chunk_size=99999)), "must have its 99,999", {}),
    "other items": (litdata_damage(lambda c: c["chunks"][0].update(chunk_size=24, dim=0)), "dim", {}),
    "negative items": (litdata_damage(lambda c: c["chunks"][0].update(chunk_size=-1)), "chunk_size", {}),
    "no dim": (litdata_damage(lambda c: c["chunks"][0].update(dim=None)), "dim", {}),
    "items that overlap": (
        lambda f: changed(write_litdata(f, some_documents(), "int32") / "chunk-0-0.bin", 8, whole(9999, "<u4")),
        "items of whole tokens",
        {},
    ),
    "raw and wide": (lambda f: write_raw(f, some_documents(), "uint32"), "--dtype|numbers of 4 bytes", {}),
    "raw and narrow": (lambda f: write_raw(f, some_documents(), "uint16"), "as uint32", {"dtype": "uint32"}),
    "raw and odd": (
        lambda f: bad(f, write=lambda f: (f / "x.npy").write_bytes(b"abc")),
        "found 3 bytes",
        {},
    ),
    "real npy, cut": (
        lambda f: os.truncate(write_npy(f, some_documents(), "uint16") / "tokens.npy", 400),
        "numbers of uint16 of its header",
        {},
    ),
    "floats in npy": (lambda f: write_npy(f, some_documents(), "float32"), "found float32", {}),
    "objects in npy": (
        lambda f: bad(f, write=lambda f: np.save(f / "x.npy", np.array([{}], dtype=object), allow_pickle=True)),
        "found object",
        {},
    ),
    "columns in npy": (
        lambda f: bad(f, write=lambda f: np.save(f / "x.npy", np.asfortranarray(np.ones((4, 5), "<u2")))),
        "row by row",
        {},
    ),
    "no list of documents": (lambda f: write_raw(f, some_documents(), "uint16"), "csv.gz", {"documents": "index"}),
    "a list that is cut": (lambda f: with_list(f, b"0,9\n9"), "listed in", {"documents": "index"}),
    "a list of overlaps": (lambda f: with_list(f, b"0,9\n5,12\n"), "tokens 5 to 12", {"documents": "index"}),
    "a list beyond": (lambda f: with_list(f, b"0,99999\n"), "99,999", {"documents": "index"}),
    "a list of words": (lambda f: with_list(f, b"begin,end\n"), "listed in", {"documents": "index"}),
    "nothing held out": (
        lambda f: write_npy(f, some_documents(), "uint16"),
        "none to hold out",
        {"validation": "val*"},
    ),
    "all held out": (lambda f: write_npy(f, some_documents(), "uint16"), "none to train on", {"validation": "*"}),
    "one token": (lambda f: write_npy(f, [np.array([4])], "uint16"), "none to hold out", {}),
    "no vocabulary": (lambda f: write_npy(f, some_documents(), "uint16"), "found neither", {"tokenizer": None}),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_adopted_is_refused_and_nothing_is_left(tmp_path: Path, name: str) -> None:
    damage, found, changes = BAD[name]
    damage(tmp_path / "x")
    with pytest.raises(DataError, match=re.compile(found, re.DOTALL)) as error:
        adopted(tmp_path / "x", tmp_path / "ours", **changes)
    assert error.value.hint
    assert {path.name for path in tmp_path.iterdir()} <= {"x"}


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "tokens grew": (lambda f: os.truncate(f / "part_text_document.bin", 9999), "bytes, as its manifest"),
    "tokens were cut": (lambda f: os.truncate(f / "part_text_document.bin", 100), "found 100 bytes"),
    "tokens are gone": (lambda f: (f / "part_text_document.bin").unlink(), "no such file"),
    "index changed": (lambda f: changed(f / "part_text_document.idx", S, b"\5"), "when its folder was adopted"),
    "index is gone": (lambda f: (f / "part_text_document.idx").unlink(), "no such file"),
    "a token changed": (lambda f: changed(f / "part_text_document.bin", 20, b"\5\0"), "must be as written"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changed_since_is_refused_before_it_is_trained_on(tmp_path: Path, name: str) -> None:
    change, found = CHANGES[name]
    adopted(write_megatron(tmp_path / "x", some_documents(), "uint16"), tmp_path / "ours")
    change(tmp_path / "x")
    with pytest.raises(DataError, match=found):
        WindowDataset(tmp_path / "ours", "train", seq_len=8, num_offsets=1).read(np.arange(20))
    with pytest.raises(DataError, match=found):
        verify_shards(tmp_path / "ours")


def test_a_taken_folder_and_another_tokenizer_are_refused(tmp_path: Path) -> None:
    folder = write_npy(tmp_path / "x", some_documents(), "uint16")
    manifest = adopted(folder, tmp_path / "ours", tokenizer=None, vocab_size=300, end_of_document=9)
    with pytest.raises(DataError, match="new or empty"):
        adopted(folder, tmp_path / "ours")
    recipe = tiny_recipe(tmp_path, tmp_path, data={"shards": str(tmp_path / "ours")})
    with pytest.raises(DataError, match="end of document of the shards, 9"):
        MtpDataModule(recipe).setup("fit")
    assert manifest.tokenizer_hash == ""
