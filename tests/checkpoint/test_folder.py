import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.format.manifest import DamagedCheckpointError
from mtp_lightning.checkpoint.format.state_tree import read_state, write_state
from mtp_lightning.errors import CheckpointError
from tests.checkpoint.runs import save_run
from tests.checkpoint.savers import check_step, save
from tests.checkpoint.test_tree import is_same
from tests.support.tiny import tiny_recipe


def some_state() -> dict[str, Any]:
    return {
        "epoch": 0,
        "loops": {"fit_loop": {"state_dict": {}}},
        "lr_schedulers": [],
        "callbacks": {"Watch": {"best": float("-inf"), "rng": (3, (1, 2), None), "seen": torch.ones(3, 4).T}},
    }


def test_a_training_state_comes_back_exactly(tmp_path: Path) -> None:
    records = write_state(tmp_path, some_state())
    assert is_same(read_state(tmp_path), some_state())
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == {
        name: record.size_bytes for name, record in records.items()
    }


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    for name in ("dump", "dumps", "load", "loads"):
        monkeypatch.setattr(pickle, name, forbidden)
    save(tmp_path, 1)
    check_step(tmp_path / "step-00000001", 1)
    save_run(tmp_path / "run", tiny_recipe(), 1, num_ranks=2)
    load_model(tmp_path / "run")
    suffixes = {path.suffix for path in tmp_path.rglob("step-*/*")}
    assert suffixes == {".json", ".safetensors", ".yaml"}


def test_state_outside_the_accepted_forms_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="PosixPath at hyper_parameters/path"):
        write_state(tmp_path / "new", {"hyper_parameters": {"path": Path("x")}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lost", ["state.json", "other.safetensors"])
def test_a_lost_file_is_named(tmp_path: Path, lost: str) -> None:
    write_state(tmp_path, some_state())
    (tmp_path / lost).unlink()
    with pytest.raises(DamagedCheckpointError, match=f"no {lost} in {tmp_path}"):
        read_state(tmp_path)
