"""Faults that `test_damage` does not have: what a folder gains, what changes under a run, what asks for pickle."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mtp_lightning.data.sampling.mixture import JoinedRows
from mtp_lightning.data.sampling.packing import PackedRows, prepare_plan
from mtp_lightning.data.sampling.windows import WindowDataset
from mtp_lightning.data.shards.manifest import load_manifest
from mtp_lightning.data.shards.verify import verify_shards
from mtp_lightning.errors import DataError
from tests.data.corpora import END, build_tiny, forge, write_corpus


def open_rows(folder: Path) -> WindowDataset:
    return WindowDataset(folder, "train", seq_len=8, num_offsets=3)


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
    with pytest.raises(DataError, match=r"000000000\.tok, byte 512 on must be as written; found changed bytes"):
        open_rows(shards).read(np.array([0]))


@pytest.mark.parametrize("part", ["tok", "len", "msk"])
def test_flipped_byte_is_never_read(tmp_path: Path, part: str) -> None:
    lines = [json.dumps({"prompt": f"ask {i}", "completion": f"answer {i * i}"}) for i in range(60)]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines))
    folder = tmp_path / "shards"
    member = build_tiny([str(tmp_path / "chat.jsonl")], folder).shards[1].members[1]
    at = {"tok": member.tokens_at, "len": member.lengths_at, "msk": member.mask_at}[part]
    assert at is not None
    content = bytearray((folder / "train/00001.tar").read_bytes())
    content[at] ^= 64
    (folder / "train/00001.tar").write_bytes(content)
    rows = open_rows(folder)
    place = rf"{folder}/train/00001\.tar, member {member.key}\.{part}, byte {at:,}"
    with pytest.raises(DataError, match=f"bytes from {place} on must be as written; found changed bytes"):
        rows.read(np.arange(len(rows)))
    clean = np.arange(int(rows.shard_rows[0]))
    assert rows.read(clean)["tokens"].shape == (clean.size, 11)


def test_shard_replaced_by_another_of_its_size_is_not_read(shards: Path) -> None:
    rows = open_rows(shards)
    whole = rows.read(np.arange(len(rows)))["tokens"]
    path = shards / "train/00001.tar"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:512] + content[512:][::-1])
    assert np.array_equal(rows.read(np.arange(len(rows)))["tokens"], whole)
    rows._maps._mapped.clear()  # as when there are too many: it has to be mapped again
    with pytest.raises(DataError, match=r"train/00001\.tar, member .* must be as written"):
        rows.read(np.arange(len(rows)))


def test_document_without_a_token_is_named(shards: Path) -> None:
    manifest = load_manifest(shards)
    member = next(m for m in manifest.shards[0].members if m.num_documents > 1)
    content = bytearray((shards / "train/00000.tar").read_bytes())
    lengths = np.frombuffer(content, "<u4", member.num_documents, member.lengths_at)
    lengths[1] += lengths[0]
    lengths[0] = 0
    (shards / "train/00000.tar").write_bytes(content)
    forge(shards)
    place = f"lengths at .*train/00000.tar, member {member.key}.len, byte {member.lengths_at:,}"
    for check in (verify_shards, lambda folder: open_rows(folder).read(np.array([0]))):
        with pytest.raises(DataError, match=f"a document must have a token or more: {place}; found 0 for document 0"):
            check(shards)


def test_id_that_the_model_lacks_is_named_with_its_source(tmp_path: Path, shards: Path) -> None:
    write_corpus(tmp_path / "other", num_documents=30, seed=4)
    build_tiny([str(tmp_path / "other")], tmp_path / "more")
    joined = JoinedRows([open_rows(tmp_path / "more"), open_rows(shards)], [1, 1], ["more", "shards"])
    first = len(open_rows(tmp_path / "more"))
    tokens = joined.read(np.array([first + 2]))["tokens"][0]
    position = int(np.argmax(tokens))
    wanted = rf"found id {tokens[position]} at {shards}/train/00000\.tar, member 0, token {16 + position}, byte"
    with pytest.raises(DataError, match=wanted):
        joined.read_known(np.array([0, first + 2])[1:], int(tokens[position]))


def test_id_in_packed_rows_is_named_with_its_place(tmp_path: Path, shards: Path) -> None:
    shape = {"seq_len": 24, "num_offsets": 3}
    prepare_plan(shards, "train", tmp_path, **shape)
    packed = PackedRows(shards, "train", tmp_path, **shape)
    for row in range(len(packed)):
        tokens = packed.read(np.array([row]))["tokens"][0]
        position = int(np.flatnonzero(tokens != END)[-1])  # in the last document of the row
        place = packed.place(row, position)
        name, at = place.partition(",")[0], int(place.rpartition(" ")[2].replace(",", ""))
        assert int.from_bytes(Path(name).read_bytes()[at : at + 2], "little") == tokens[position]


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
    rows = WindowDataset(tmp_path / "shards", "train", seq_len=600, num_offsets=4)
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
