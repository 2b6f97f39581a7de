"""Every kind of damage is named before anything is trained on it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mtp_lightning.data.sampling.windows import WindowDataset
from mtp_lightning.data.shards.manifest import Member, load_manifest
from mtp_lightning.data.shards.verify import verify_shards
from mtp_lightning.errors import DataError
from tests.data.corpora import build_tiny, forge, write_corpus

SHARD = "train/00001.tar"


def open_rows(folder: Path) -> WindowDataset:
    return WindowDataset(folder, "train", seq_len=8, num_offsets=3)


def overwrite(path: Path, at: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(content)


def second_member(folder: Path) -> Member:
    return load_manifest(folder).shards[1].members[1]


def test_whole_shards_pass(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = verify_shards(shards)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(manifest.shards) + 1
    assert all(line.startswith("ok ") for line in lines)
    assert manifest.fingerprint in lines[-1]


@pytest.mark.parametrize("check", [open_rows, verify_shards])
def test_shard_cut_in_half_is_named_with_both_sizes(shards: Path, check: Callable[[Path], object]) -> None:
    path = shards / SHARD
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[: size // 2])
    with pytest.raises(DataError, match=rf"{SHARD} must have {size:,} bytes.* found {size // 2:,} bytes\. Copy"):
        check(shards)


@pytest.mark.parametrize("check", [open_rows, verify_shards])
def test_missing_shard_is_named(shards: Path, check: Callable[[Path], object]) -> None:
    (shards / SHARD).unlink()
    with pytest.raises(DataError, match=f"{SHARD} must have .* found no such file. Copy"):
        check(shards)


@pytest.mark.parametrize("part", ["tok", "len"])
def test_flipped_byte_is_found_with_shard_member_and_offset(shards: Path, part: str) -> None:
    member = second_member(shards)
    at = member.tokens_at if part == "tok" else member.lengths_at
    old = (shards / SHARD).read_bytes()[at + 4]
    overwrite(shards / SHARD, at + 4, bytes([old ^ 64]))
    open_rows(shards)  # sizes alone do not show it
    with pytest.raises(DataError, match=f"{SHARD}, member {member.key}.{part}, byte {at:,} on must be as written"):
        verify_shards(shards)


def test_flipped_byte_between_members_is_found(shards: Path) -> None:
    overwrite(shards / SHARD, second_member(shards).tokens_at - 12, b"\1")
    with pytest.raises(DataError, match=f"{SHARD} must have sha256 .*, by a tar header or padding"):
        verify_shards(shards)


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda text: text.replace('"vocabulary": 257', '"vocabulary": 300'), "as it was written, with fingerprint"),
        (lambda text: text[: len(text) // 2], "must be a manifest of shards; found .* not JSON"),
        (lambda text: "[]", "must be a manifest of shards; found a list"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 3'), "version 1 or 2; found 3"),
        (lambda text: text.replace('"fingerprint"', '"finger"'), "with fingerprint None"),
    ],
)
def test_changed_manifest_is_refused(shards: Path, damage: Callable[[str], str], found: str) -> None:
    path = shards / "manifest.json"
    changed = damage(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(DataError, match=found):
        open_rows(shards)


def test_manifest_signed_with_a_wrong_field_is_refused(shards: Path) -> None:
    content = json.loads((shards / "manifest.json").read_text())
    assert content["dtype"] == "uint16"
    with pytest.raises(ValueError, match="dtype"):
        forge(shards, dtype="uint8")
    with pytest.raises(DataError, match="must be a manifest of shards; found dtype: "):
        open_rows(shards)


def test_missing_manifest_is_named(shards: Path) -> None:
    (shards / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"must have its manifest, .* found a folder without one"):
        open_rows(shards)
    with pytest.raises(DataError, match=r"must have its manifest, .* found no such folder"):
        open_rows(shards / "nowhere")


def test_index_of_other_shards_is_refused(shards: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "other", seed=1)
    build_tiny([str(tmp_path / "other")], tmp_path / "more")
    shutil.copy(tmp_path / "more/index.npz", shards / "index.npz")
    with pytest.raises(DataError, match=r"must be the index of the manifest .* found the index of fingerprint"):
        open_rows(shards)


@pytest.mark.parametrize("content", [None, b"", b"PK\3\4 and no more", b"\x80\4.", b"\x93NUMPY\1\0"])
def test_damaged_index_is_refused(shards: Path, content: bytes | None) -> None:
    (shards / "index.npz").unlink()
    if content is not None:
        (shards / "index.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"index.npz must be the index of the manifest"):
        open_rows(shards)


def test_index_that_says_otherwise_than_the_manifest_is_found(shards: Path) -> None:
    arrays = dict(np.load(shards / "index.npz"))
    arrays["tokens_at"] += 2
    np.savez(shards / "index.npz", **arrays)
    with pytest.raises(DataError, match=r"tokens_at in the index of .* must be as in the manifest"):
        verify_shards(shards)


def test_token_beyond_the_vocabulary_is_found(shards: Path) -> None:
    member = second_member(shards)
    overwrite(shards / SHARD, member.tokens_at + 6, (300).to_bytes(2, "little"))
    forge(shards)
    place = f"{SHARD}, member {member.key}.tok, byte {member.tokens_at + 6:,}"
    with pytest.raises(DataError, match=f"token id at {place} must be below 257; found 300"):
        verify_shards(shards)


def test_lengths_that_do_not_add_up_are_found(shards: Path) -> None:
    member = second_member(shards)
    overwrite(shards / SHARD, member.lengths_at, (5000).to_bytes(4, "little"))
    forge(shards)
    place = f"{SHARD}, member {member.key}.len, byte {member.lengths_at:,}"
    with pytest.raises(DataError, match=f"lengths at {place} must add up to the {member.num_tokens:,} tokens; found"):
        verify_shards(shards)


def test_document_without_its_end_is_found(shards: Path) -> None:
    member = second_member(shards)
    last = member.tokens_at + 2 * (member.num_tokens - 1)
    overwrite(shards / SHARD, last, (7).to_bytes(2, "little"))
    forge(shards)
    place = f"{SHARD}, member {member.key}.tok, byte {last:,}"
    with pytest.raises(DataError, match=f"must end with id 256 at {place}; found id 7"):
        verify_shards(shards)


def test_offsets_that_webdataset_does_not_share_are_found(shards: Path) -> None:
    content = json.loads((shards / "manifest.json").read_text())
    members = content["shards"][1]["members"]
    members[0], members[1] = {**members[1], "key": members[0]["key"]}, {**members[0], "key": members[1]["key"]}
    forge(shards, shards=content["shards"])
    with pytest.raises(DataError, match=f"webdataset must read what lies at {SHARD}, member {members[0]['key']}"):
        verify_shards(shards)


def test_member_that_webdataset_does_not_find_is_named(shards: Path) -> None:
    content = json.loads((shards / "manifest.json").read_text())
    last = content["shards"][1]["members"].pop()
    forge(shards, shards=content["shards"])
    with pytest.raises(DataError, match=f"find no more members in {SHARD}; found member {last['key']}"):
        verify_shards(shards)
