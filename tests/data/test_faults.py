"""Faults that `test_damage` does not have: what a folder gains, what changes under a run, what asks for pickle."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mtp_lightning.data.manifest import load_manifest
from mtp_lightning.data.rows import Rows
from mtp_lightning.data.verify import verify_shards
from mtp_lightning.errors import DataError
from tests.data.corpora import END, build_tiny, forge


def open_rows(folder: Path) -> Rows:
    return Rows(folder, "train", window_tokens=8, num_offsets=3)


def test_shard_that_the_manifest_does_not_know_is_refused(shards: Path) -> None:
    (shards / "train/00099.tar").write_bytes((shards / "train/00000.tar").read_bytes())
    for check in (open_rows, verify_shards):
        with pytest.raises(DataError, match=r"only the shards of its manifest; found train/00099\.tar"):
            check(shards)


def test_shard_replaced_under_a_run_is_refused_where_it_is_mapped(shards: Path) -> None:
    rows = open_rows(shards)
    shard = shards / "train/00001.tar"
    shard.write_bytes(shard.read_bytes() + bytes(512))
    with pytest.raises(DataError, match=r"train/00001\.tar must have .* found"):
        rows.read(np.arange(len(rows)))


def test_mapped_shard_outlives_its_name(shards: Path) -> None:
    rows = open_rows(shards)
    before = rows.read(np.arange(len(rows)))["tokens"]
    for path in (shards / "train").glob("*.tar"):
        content = path.read_bytes()
        path.unlink()  # as rsync and mv do: a new file under the old name
        path.write_bytes(bytes(len(content)))
    assert np.array_equal(rows.read(np.arange(len(rows)))["tokens"], before)


def test_ids_stored_in_another_type_are_found(shards: Path) -> None:
    forge(shards, dtype="uint32")
    with pytest.raises(DataError):
        verify_shards(shards)


def test_member_that_asks_for_pickle_is_refused(tmp_path: Path, shards: Path) -> None:
    """What stock webdataset would unpickle when asked to decode is no member of a shard."""
    path = shards / "train/00000.tar"
    before = path.read_bytes()
    with tarfile.open(path, "a", format=tarfile.USTAR_FORMAT) as tar:
        payload = pickle.dumps({"never": "loaded"})
        header = tarfile.TarInfo("000000000.pyd")
        header.size = len(payload)
        tar.addfile(header, io.BytesIO(payload))
    assert path.read_bytes() != before
    content = json.loads((shards / "manifest.json").read_text())
    content["shards"][0]["num_bytes"] = path.stat().st_size
    forge(shards, shards=content["shards"])
    with pytest.raises(DataError, match=r"find no more members in train/00000\.tar; found member 000000000"):
        verify_shards(shards)


def test_document_longer_than_a_member_is_a_member_of_its_own(tmp_path: Path) -> None:
    texts = ["short", "x" * 5000, "short again"] * 8
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    build_tiny([str(tmp_path / "x.jsonl")], tmp_path / "shards", member_tokens=100)
    manifest = verify_shards(tmp_path / "shards")
    longest = max(member.num_tokens for shard in manifest.shards for member in shard.members)
    assert longest >= 5001
    rows = Rows(tmp_path / "shards", "train", window_tokens=600, num_offsets=4)
    read = rows.read(np.arange(len(rows)))["tokens"]
    assert (read == ord("x")).all(axis=1).any()


def test_empty_documents_leave_no_trace_but_a_count(tmp_path: Path) -> None:
    texts = ["", "text"] * 20
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    manifest = build_tiny([str(tmp_path / "x.jsonl")], tmp_path / "shards")
    assert manifest.skipped_empty == 20
    rows = open_rows(tmp_path / "shards")
    read = rows.read(np.arange(len(rows)))["tokens"].ravel()
    assert not ((read[1:] == END) & (read[:-1] == END)).any()
    assert load_manifest(tmp_path / "shards").num_documents("train") > 0
