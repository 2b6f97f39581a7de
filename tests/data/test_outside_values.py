"""Values that others wrote, and what each may be before it becomes a path, a size or a loop."""

import contextlib
import json
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtp_lightning.data.generated.log import check_request
from mtp_lightning.data.sampling.packing import PackedRows, Plan, _checksum, plan_path, prepare_plan
from mtp_lightning.data.sampling.windows import WindowDataset
from mtp_lightning.data.shards.arrays import whole_numbers
from mtp_lightning.data.shards.index import build_index, load_index
from mtp_lightning.data.shards.manifest import Manifest, fingerprint_of, load_manifest
from mtp_lightning.data.shards.staging import StagingFolder
from mtp_lightning.data.shards.stats import lengths_of
from mtp_lightning.data.text.sources import find_files
from mtp_lightning.data.tokenizers.files import HuggingFaceTokenizer
from mtp_lightning.errors import DataError

HUGE = 10**11
MANIFEST = [
    # field, what an attacker or a broken builder wrote, what the error names
    *(("shards.0.sha256", digest, "sha256") for digest in
      ("/any/path/x", "../../x", "", "a" * 63, "A" * 64, "a" * 64 + "\n", "a" * 65, "\0" * 64, 5, None)),
    *(("shards.0.name", name, "name") for name in
      ("/etc/passwd", "../x.tar", "train/../x.tar", "train//x.tar", "train/a/b.tar", "train\\x.tar", "x.tar", "train/",
       "train/.tar", "train/x\0.tar", "train/x\n.tar", "train/x y.tar", "train/" + "x" * 300, "train/x.tar\n",
       "http://elsewhere/x.tar", "train/x?y.tar", "", None, 3)),
    ("shards.0.name", "validation/x.tar", "the folder of its split"),
    ("shards.0.split", "../train", "split"),
    *(("shards.0.num_bytes", size, "num_bytes") for size in (-512, 0, 3.0, "512", True, 1000, 2**41, 10**30, None)),
    ("shards.0.members", [], "members"),
    ("shards.0.members", {}, "members"),
    ("shards", [], "shards"),
    *(("shards.0.members.0.key", key, "key") for key in ("", "a/b", "a\x1b[2J", "k" * 300, 1)),
    *((f"shards.0.members.0.{place}", value, place) for place in ("tokens_at", "lengths_at", "mask_at")
      for value in (-512, 513, 1.0, "512", 2**41, 10**30)),
    *((f"shards.0.members.0.{place}", 2**39, "reaches beyond") for place in ("tokens_at", "lengths_at")),
    *((f"shards.0.members.0.{count}", value, count) for count in ("num_tokens", "num_documents")
      for value in (-1, 0, 1.5, "7", True, 10**30)),
    ("shards.0.members.0.num_tokens", HUGE, "reaches beyond"),
    ("shards.0.members.0.num_documents", HUGE, "documents of"),
    *((f"shards.0.members.0.{crc}", value, crc) for crc in ("tokens_crc32", "lengths_crc32", "mask_crc32")
      for value in (-1, 2**32, 1.0, "0")),
    ("shards.0.members.0.mask_at", 0, "a mask has both"),
    ("shards.0.members.0.mask_crc32", 0, "a mask has both"),
    ("shards.0.surprise\x1b", 1, r"surprise\\x1b"),
    ("dtype", "object", "dtype"),
    ("dtype", "uint8", "dtype"),
    *(("vocabulary", value, "vocabulary") for value in (0, -1, 1e9, 2**33)),
    *((name, value, name) for name in ("end_of_document", "largest_token") for value in (-1, 1.5, 2**32)),
    *((name, 257, "ids up to 256") for name in ("end_of_document", "largest_token")),
    *((name, value, name) for name in ("parse_special_tokens", "add_special_tokens") for value in (0, 1, "yes")),
    *(("chat_template", value, "chat_template") for value in ("../x", "A" * 64, "a" * 63, 5)),
    *(("validation_share", value, "validation_share") for value in (-0.1, 1.5, float("nan"), float("inf"), "x")),
    *((name, -1, name) for name in ("source_files", "source_bytes", "skipped_empty", "skipped_binary",
                                    "skipped_not_utf8", "skipped_duplicates")),
    *((name, "x" * 5000, name) for name in ("tokenizer", "tokenizer_hash", "source_listing")),
    ("sources", [{"name": "x", "num_documents": -1, "num_tokens": 2}], "num_documents"),
    ("sources", [{"name": "x" * 5000, "num_documents": 1, "num_tokens": 2}], "name"),
]  # fmt: skip


def signed(folder: Path, field: str, value: Any) -> None:
    """Set one field of a manifest and sign it, as anybody can."""
    content = json.loads((folder / "manifest.json").read_text())
    del content["fingerprint"]
    *way, last = [int(part) if part.isdigit() else part for part in field.split(".")]
    place: Any = content
    for part in way:
        place = place[part]
    place[last] = value
    (folder / "manifest.json").write_text(json.dumps({"fingerprint": fingerprint_of(content), **content}))


@pytest.mark.parametrize(("field", "value", "named"), MANIFEST)
def test_every_value_of_a_manifest_is_checked(shards: Path, field: str, value: Any, named: str) -> None:
    signed(shards, field, value)
    with pytest.raises(DataError, match=rf"must be a manifest of shards; found [^;]*{named}") as caught:
        load_manifest(shards)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_every_field_of_a_manifest_is_in_the_table(shards: Path) -> None:
    content = load_manifest(shards).model_dump()
    shard = content["shards"][0]
    named = {field.rpartition(".")[2] for field, _, _ in MANIFEST}
    assert {*content, *shard, *shard["members"][0]} - {"format_version"} <= named


def test_two_shards_of_one_name_are_refused(shards: Path) -> None:
    signed(shards, "shards.1.name", json.loads((shards / "manifest.json").read_text())["shards"][0]["name"])
    with pytest.raises(DataError, match="two shards of one name"):
        load_manifest(shards)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"\xff", b"{}", b'{"fingerprint": "\\u001b"}']
)
def test_manifest_that_is_no_object_is_refused(shards: Path, content: bytes) -> None:
    (shards / "manifest.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_manifest(shards)
    assert str(caught.value).isprintable()


def claiming(count: object, dtype: str = "<i8", content: bytes = b"") -> bytes:
    """A `.npy` file with a header of any claim."""
    header = repr({"descr": dtype, "fortran_order": False, "shape": (count,)}).encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + content


def saved(array: Any) -> bytes:
    buffer = BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


ARRAYS = [
    (claiming(HUGE), "100,000,000,000 numbers of int64, 800,000,000,000 bytes, in 0 bytes"),
    (claiming(HUGE, "|u1", bytes(10)), "in 10 bytes"),
    (claiming(-2, "<i8", bytes(16)), "-2 numbers"),
    (claiming(1, "<i8", bytes(16)), "1 numbers of int64, 8 bytes, in 16 bytes"),
    (claiming(3, "<i8", bytes(16)), "in 16 bytes"),
    (claiming("x"), "shape"),
    (claiming(2, "|O", bytes(16)), "dimensions of object"),
    (saved(np.zeros(3)), "1 dimensions of float64"),
    (saved(np.zeros((2, 2), int)), "2 dimensions of int64"),
    (saved(np.int64(3)), "0 dimensions of int64"),
    (saved(np.arange(3))[:-1], "in 23 bytes"),
    (saved(np.arange(3))[:20], "."),
    (b"\x93NUMPY\7\0" + bytes(100), "version 7.0"),
    (b"PK\3\4" + bytes(100), "magic"),
    (b"", "."),
]  # fmt: skip


@pytest.mark.parametrize(("content", "found"), ARRAYS)
def test_array_is_compared_with_what_is_there(content: bytes, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        whole_numbers(content)


@pytest.mark.parametrize("dtype", ["u1", "<i4", ">u2", "<i8"])
def test_whole_array_is_read(dtype: str) -> None:
    wanted = np.arange(5).astype(dtype)
    assert np.array_equal(whole_numbers(saved(wanted)), wanted)
    assert whole_numbers(saved(wanted[:0])).size == 0


def rewritten(path: Path, changes: dict[str, bytes | None], *, compression: int = zipfile.ZIP_STORED) -> None:
    """Write a `.npz` file again with other parts."""
    with zipfile.ZipFile(path) as file:
        parts: dict[str, bytes | None] = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in {**parts, **changes}.items():
            if content is not None:
                file.writestr(name, content)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        *(({"tokens_at.npy": content}, "tokens_at: ") for content, _ in ARRAYS),
        ({"tokens_at.npy": None}, "no item named"),
        ({"tokens_at.npy": saved(np.arange(1))}, "tokens_at in the index of .* must be as in the manifest"),
        ({"shard.npy": saved(np.full(100, -1))}, "shard in the index of"),
        ({"fingerprint.npy": saved(np.arange(32))}, "the index of fingerprint 00000"),
    ],
)  # fmt: skip
def test_index_is_compared_with_the_manifest(shards: Path, changes: dict[str, bytes | None], found: str) -> None:
    rewritten(shards / "index.npz", changes)
    with pytest.raises(DataError, match=found):
        WindowDataset(shards, "train", seq_len=8, num_offsets=3)


def test_index_that_holds_other_types_or_is_compressed_is_refused(shards: Path) -> None:
    manifest, path = load_manifest(shards), shards / "index.npz"
    whole, arrays = path.read_bytes(), dict(np.load(path))
    np.savez(path, **{**arrays, "num_tokens": arrays["num_tokens"].astype(float)})
    with pytest.raises(DataError, match="num_tokens: 1 dimensions of float64"):
        load_index(shards, manifest)
    path.write_bytes(whole)
    rewritten(path, {}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match="is compressed"):
        load_index(shards, manifest)


@pytest.mark.parametrize("place", range(0, 400, 7))
def test_index_with_any_byte_changed_is_refused_or_the_same(shards: Path, place: int) -> None:
    """Fields of a zip that nobody needs, such as a time, may say anything."""
    path = shards / "index.npz"
    content = bytearray(path.read_bytes())
    content[-place - 1] ^= 0x5A
    path.write_bytes(content)
    manifest = load_manifest(shards)
    with contextlib.suppress(DataError):
        assert np.array_equal(load_index(shards, manifest).tokens_at, build_index(manifest).tokens_at)


PLANS: list[tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = [
    (lambda plan: {"shards": plan["shards"] + 1000}, "a shard that there is not"),
    (lambda plan: {"shards": plan["shards"] - 1000}, "a shard that there is not"),
    (lambda plan: {"shards": plan["shards"][:-1]}, "pieces without"),
    (lambda plan: {"starts": plan["starts"] + 2**40}, "reaches out"),
    (lambda plan: {"starts": plan["starts"] - 2**40}, "reaches out"),
    (lambda plan: {"lengths": plan["lengths"] * 0}, "reaches out"),
    (lambda plan: {"lengths": plan["lengths"] + 2**60}, "reaches out"),
    (lambda plan: {"first_pieces": plan["first_pieces"][:0]}, "other pieces"),
    (lambda plan: {"first_pieces": plan["first_pieces"][::-1].copy()}, "other pieces"),
    (lambda plan: {"first_pieces": plan["first_pieces"] * HUGE}, "other pieces"),
    (lambda plan: {"first_pieces": plan["first_pieces"][[0, -1]]}, "a row that overflows"),
    (lambda plan: {"starts": plan["starts"].astype(float)}, "starts: 1 dimensions of float64"),
    (lambda plan: {"starts": plan["starts"].astype(np.int32)}, "another type"),
]


@pytest.mark.parametrize(("damage", "found"), PLANS)
def test_packing_plan_is_compared_with_the_shards(shards: Path, tmp_path: Path, damage: Any, found: str) -> None:
    shape = {"seq_len": 40, "num_offsets": 3}
    prepare_plan(shards, "train", tmp_path, **shape)
    path = plan_path(tmp_path, load_manifest(shards), "train", **shape)
    arrays = {name: array for name, array in np.load(path).items() if name != "checksum"}
    assert len(PackedRows(shards, "train", tmp_path, **shape)) > 1
    changed = {**arrays, **damage(arrays)}
    np.savez(path, checksum=_checksum(Plan(**changed)), **changed)
    with pytest.raises(DataError, match=rf"must be a plan of packed rows; found .*{found}"):
        PackedRows(shards, "train", tmp_path, **shape)


def test_lengths_that_were_changed_are_not_counted(shards: Path) -> None:
    manifest = load_manifest(shards)
    path = shards / manifest.shards[0].name
    content = bytearray(path.read_bytes())
    at = manifest.shards[0].members[0].lengths_at
    content[at : at + 4] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"member 000000000\.len, byte {at:,} on must be as written"):
        lengths_of(shards, manifest)


@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b'{"train": -1, "validation": 0}', b'{"train": 1}', b'{"train": 1.5, "validation": 0}', b"\xff"],
)
def test_journal_of_a_killed_build_is_taken_up_to_its_damage(tmp_path: Path, line: bytes) -> None:
    good = b'{"train": 0, "validation": 0}\n'
    (tmp_path / "journal.jsonl").write_bytes(good + line + b"\n" + good)
    partial = StagingFolder(tmp_path)
    assert partial.known(0) == {"train", "validation"}
    assert partial.known(1) == frozenset()
    partial.abandon(is_kept=False)


@pytest.mark.parametrize("change", [{"name": "../../x.tar"}, {"num_bytes": 512}, {"sha256": "x"}])
def test_record_of_a_killed_build_is_taken_only_for_its_shard(tmp_path: Path, shards: Path, change: Any) -> None:
    shard = load_manifest(shards).shards[0]
    record = shards / f"{shard.name}.json"
    record.write_text(json.dumps({"shard": shard.model_dump(), "largest_token": 3}))
    for own, num_kept in ({}, 1), (change, 0):
        record.write_text(json.dumps({"shard": {**shard.model_dump(), **own}, "largest_token": 3}))
        partial = StagingFolder(shards)
        partial.abandon(is_kept=True)
        assert partial.num_kept == num_kept


@pytest.mark.parametrize("content", [b"[]", b"{", b"[" * 100_000, b"\xff", b"3", b"x" * 2**20])
def test_request_of_half_written_shards_is_an_object(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "texts.jsonl").write_bytes(content + b"\n")
    with pytest.raises(DataError, match=r"texts\.jsonl must be as it was written"):
        check_request(tmp_path, {"prompts": "x"})


def test_tokenizer_without_tokens_and_a_folder_in_its_place_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"version": "1.0", "model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}))
    with pytest.raises(DataError, match="no tokens in it"):
        HuggingFaceTokenizer(path, end_of_document=0)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=r"must be readable; found a folder, a FIFO or a device"):
        HuggingFaceTokenizer(path, end_of_document=0)


def test_a_link_to_nothing_that_a_pattern_matches_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"a\.txt', a link to nothing"):
        find_files([str(tmp_path / "*.txt")])
    (tmp_path / "b.md").symlink_to(tmp_path / "b.md")
    with pytest.raises(DataError, match=r"b\.md'"):
        find_files([str(tmp_path / "*.md")])
    with pytest.raises(DataError, match="Correct the pattern"):
        find_files([str(tmp_path / "a**b/*")])


def test_manifest_is_what_it_was(shards: Path) -> None:
    """The checks refuse nothing that is built here, and change no fingerprint."""
    content = json.loads((shards / "manifest.json").read_text())
    assert load_manifest(shards).fingerprint == content.pop("fingerprint")
    assert Manifest.model_validate(content).content() == content
