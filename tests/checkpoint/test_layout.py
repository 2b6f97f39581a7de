import json
import shutil
from pathlib import Path

import pytest

from mtp_lightning.checkpoint.format.commit import read_pointer
from mtp_lightning.checkpoint.format.folder import complete_checkpoints, newest_complete, verify
from mtp_lightning.checkpoint.format.manifest import DamagedCheckpointError
from mtp_lightning.errors import CheckpointError
from tests.checkpoint.runs import flip_a_byte
from tests.checkpoint.savers import save, shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path, 1, keep=9)
    save(tmp_path, 2, keep=9)
    return tmp_path


MODEL = "model-00001-of-00001.safetensors"


def test_the_manifest_says_what_the_checkpoint_is(folder: Path) -> None:
    manifest = json.loads((folder / "step-00000002" / "MANIFEST.json").read_text())
    assert set(manifest["files"]) == {"other.safetensors", "state.json", "recipe.yaml", *shards(1)}
    assert manifest["step"] == 2
    assert manifest["tokens"] == 128
    assert manifest["head_numbering"] == "offsets (next token included)"
    assert manifest["num_offsets"] == 4
    assert manifest["layers"] == {"trunk": 5, "heads": 3}
    assert manifest["world_size"] == 1
    assert manifest["strategy"] == "single"
    assert manifest["format_version"] == 2


def test_complete_checkpoints_are_listed_in_order_of_steps(tmp_path: Path) -> None:
    for step in (9, 10, 100_000_000):
        save(tmp_path, step, keep=9)
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == [9, 10, 100_000_000]


def test_a_missing_folder_has_no_checkpoints(tmp_path: Path) -> None:
    assert complete_checkpoints(tmp_path / "none") == []
    assert newest_complete(tmp_path / "none") is None


@pytest.mark.parametrize("name", [*shards(1), "other.safetensors", "state.json"])
def test_a_flipped_byte_is_named_and_the_previous_checkpoint_taken(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_a_byte(folder / "step-00000002" / name)
    with pytest.raises(DamagedCheckpointError, match=rf"sha256 .* instead of .*: .*step-00000002/{name}"):
        verify(folder / "step-00000002")
    newest = newest_complete(folder)
    assert newest is not None
    assert newest.step == 1
    assert (folder / "step-00000002.bad").is_dir()
    assert "step-00000002.bad" in capsys.readouterr().out


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda path: cut(path / MODEL), "bytes instead of"),
        (lambda path: (path / MODEL).unlink(), "no such file"),
        (lambda path: (path / "MANIFEST.json").unlink(), "none in"),
        (lambda path: cut(path / "MANIFEST.json"), "MANIFEST.json"),
        (lambda path: (path / "MANIFEST.json").write_text("[]"), "MANIFEST.json"),
        (lambda path: (path / "MANIFEST.json").write_text("{}"), "Field required"),
    ],
)
def test_incomplete_checkpoints_are_passed_over(folder: Path, harm: object, named: str) -> None:
    harm(folder / "step-00000002")  # type: ignore[operator]
    with pytest.raises(DamagedCheckpointError, match=named):
        verify(folder / "step-00000002")
    assert [checkpoint.step for checkpoint in complete_checkpoints(folder)] == [1]
    newest = newest_complete(folder)
    assert newest is not None
    assert newest.step == 1


def test_a_checkpoint_under_another_name_is_damaged(folder: Path) -> None:
    shutil.copytree(folder / "step-00000001", folder / "step-00000009")
    with pytest.raises(DamagedCheckpointError, match="step 1 in a folder called step-00000009"):
        verify(folder / "step-00000009")


def test_a_second_damaged_checkpoint_of_one_step_gets_its_own_name(folder: Path) -> None:
    for _ in range(2):
        cut(folder / "step-00000002" / "state.json")
        newest_complete(folder)
        save(folder, 2, keep=9)
    assert (folder / "step-00000002.bad").is_dir()
    assert (folder / "step-00000002.bad.2").is_dir()


@pytest.mark.parametrize(("version", "hint"), [(1, "version that wrote it"), (3, "Upgrade")])
def test_another_format_is_an_error_and_not_damage(folder: Path, version: int, hint: str) -> None:
    path = folder / "step-00000002" / "MANIFEST.json"
    path.write_text(path.read_text().replace('"format_version": 2', f'"format_version": {version}'))
    with pytest.raises(CheckpointError, match=f"must be 2; found {version} in .*{hint}"):
        newest_complete(folder)
    assert (folder / "step-00000002").is_dir()


def test_pointers_name_complete_checkpoints_only(folder: Path) -> None:
    assert read_pointer(folder, "last") == folder / "step-00000002"
    assert read_pointer(folder, "best") is None
    cut(folder / "step-00000002" / "state.json")
    assert read_pointer(folder, "last") is None
