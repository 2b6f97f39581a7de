"""One document or few are split all the same: a single one by place, several with at least one held out."""

import json
from pathlib import Path

import numpy as np
import pytest

from mtp_lightning.data.loading.corpus import prepare_shards
from mtp_lightning.data.sampling.windows import WindowDataset
from mtp_lightning.data.shards.manifest import Manifest, Shard, Split
from mtp_lightning.data.shards.staging import StagingFolder
from mtp_lightning.data.shards.verify import verify_shards
from mtp_lightning.errors import DataError
from tests.data.corpora import END, build_tiny, is_held_out, tiny_recipe


def tokens_of(folder: Path, manifest: Manifest, split: Split) -> list[int]:
    tokens: list[int] = []
    for shard in manifest.shards_of(split):
        content = (folder / shard.name).read_bytes()
        for member in shard.members:
            tokens += np.frombuffer(content, "<u2", member.num_tokens, member.tokens_at).tolist()
    return tokens


@pytest.mark.parametrize("num_bytes", [2, 3, 10, 1000])
@pytest.mark.parametrize("share", [0.03, 0.5, 0.99])
def test_a_single_document_is_split_by_place(tmp_path: Path, num_bytes: int, share: float) -> None:
    text = bytes(range(97, 97 + 25)) * 40
    (tmp_path / "one.txt").write_bytes(text[:num_bytes])
    build_tiny([str(tmp_path / "one.txt")], tmp_path / "shards", validation_fraction=share)
    manifest = verify_shards(tmp_path / "shards")
    train, held_out = (tokens_of(tmp_path / "shards", manifest, split) for split in ("train", "validation"))
    assert train[-1] == held_out[-1] == END
    assert bytes(train[:-1] + held_out[:-1]) == text[:num_bytes]
    assert len(train) > 1 < len(held_out)
    assert abs(len(held_out) - share * num_bytes) <= 2
    again = build_tiny([str(tmp_path / "one.txt")], tmp_path / "again", validation_fraction=share)
    assert again.fingerprint == manifest.fingerprint


@pytest.mark.parametrize("num_documents", [2, 3, 40])
@pytest.mark.parametrize("share", [1e-9, 0.03, 0.5, 1 - 1e-9])
def test_some_of_several_documents_are_held_out_whichever_the_draw(
    tmp_path: Path, num_documents: int, share: float
) -> None:
    for number in range(5):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("\n".join(json.dumps({"text": f"text {k}"}) for k in range(num_documents)))
        drawn = sum(is_held_out(f"{number}.jsonl:{k}", share) for k in range(1, num_documents + 1))
        manifest = build_tiny([str(path)], tmp_path / f"shards_{number}", validation_fraction=share)
        found = manifest.num_documents("validation")
        assert found == (drawn if 0 < drawn < num_documents else 1)
        assert manifest.num_documents("train") == num_documents - found


def test_a_build_by_place_that_failed_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.txt").write_text("a text of one file")
    whole = build_tiny([str(tmp_path / "one.txt")], tmp_path / "whole", validation_fraction=0.03)
    note, noted = StagingFolder.note_shard, list[Shard]()

    def note_and_fail(self: StagingFolder, shard: Shard, largest_token: int) -> None:
        note(self, shard, largest_token)
        noted.append(shard)
        if len(noted) == 2:  # the first was of the build that left a split empty
            raise OSError(5, "a disk that fails")

    monkeypatch.setattr(StagingFolder, "note_shard", note_and_fail)
    with pytest.raises(DataError, match="a disk that fails"):
        build_tiny([str(tmp_path / "one.txt")], tmp_path / "shards", validation_fraction=0.03)
    again = build_tiny([str(tmp_path / "one.txt")], tmp_path / "shards", validation_fraction=0.03, show_progress=True)
    assert again.fingerprint == whole.fingerprint
    assert "going on with 1 finished shards" in capsys.readouterr().out


def test_what_is_done_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.txt").write_text("a text of one file")
    build_tiny([str(tmp_path / "one.txt")], tmp_path / "shards", show_progress=True)
    said = capsys.readouterr().out
    assert "none of 1 for" in said
    assert "so its last part is held out" in said


def test_files_of_one_name_are_each_split_by_place(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "input.txt").write_text(folder * 100)
    sources = [str(tmp_path / folder / "input.txt") for folder in ("a", "b")]
    manifest = build_tiny(sources, tmp_path / "shards", validation_fraction=0.1)
    held_out = bytes(np.clip(tokens_of(tmp_path / "shards", manifest, "validation"), 0, 255).astype(np.uint8))
    assert held_out == b"a" * 9 + b"\xff" + b"b" * 9 + b"\xff"


def test_a_single_pair_is_cut_within_what_is_learnt(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"prompt": "q" * 50, "completion": "a" * 10}))
    manifest = build_tiny([str(tmp_path / "one.jsonl")], tmp_path / "shards", validation_fraction=0.3)
    held_out = tokens_of(tmp_path / "shards", manifest, "validation")
    assert held_out == [97] * 2 + [END]
    assert manifest.is_masked("train")


@pytest.mark.parametrize("text", ["", "x"])
def test_what_cannot_be_split_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "one.txt").write_text(text)
    with pytest.raises(DataError, match=r"at least one document"):
        build_tiny([str(tmp_path / "one.txt")], tmp_path / "shards")
    assert [path.name for path in tmp_path.iterdir()] == ["one.txt"]


def test_a_recipe_of_one_file_gives_rows_of_both_splits(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text("to be or not to be, " * 50)
    folder = prepare_shards(tiny_recipe(tmp_path / "cache", tmp_path / "input.txt"))
    for split in ("train", "validation"):
        assert len(WindowDataset(folder, split, seq_len=8, num_offsets=3)) > 3  # type: ignore[arg-type]
