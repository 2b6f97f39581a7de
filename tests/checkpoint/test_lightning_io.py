import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_lightning.checkpoint.commit import saving
from mtp_lightning.checkpoint.lightning_io import SafeCheckpointIO
from mtp_lightning.checkpoint.manifest import DamagedCheckpointError, Moment
from mtp_lightning.errors import CheckpointError
from tests.checkpoint.savers import FACTS
from tests.checkpoint.test_tree import is_same


def trained_state() -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3))
    model[1].weight = torch.nn.Parameter(model[0].weight.T)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    return {
        "epoch": 0,
        "state_dict": model.state_dict(),
        "loops": {"fit_loop": {"state_dict": {}}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [],
        "callbacks": {"Watch": {"best": float("-inf"), "rng": (3, (1, 2), None)}},
    }


def save(folder: Path, state: dict[str, Any]) -> Path:
    with saving(folder, Moment(step=1, tokens=1), FACTS) as partial:
        SafeCheckpointIO().save_checkpoint(state, partial)
    return folder / "step-00000001"


def test_a_training_state_comes_back_exactly(tmp_path: Path) -> None:
    state = trained_state()
    assert is_same(SafeCheckpointIO().load_checkpoint(save(tmp_path, state)), state)


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError

    for name in ("dump", "dumps", "load", "loads"):
        monkeypatch.setattr(pickle, name, forbidden)
    path = save(tmp_path, trained_state())
    SafeCheckpointIO().load_checkpoint(path, weights_only=False)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors", ".yaml"}


def test_an_uncommitted_or_damaged_folder_is_not_loaded(tmp_path: Path) -> None:
    SafeCheckpointIO().save_checkpoint(trained_state(), tmp_path / "loose")
    with pytest.raises(DamagedCheckpointError, match=r"MANIFEST\.json"):
        SafeCheckpointIO().load_checkpoint(tmp_path / "loose")
    path = save(tmp_path, trained_state())
    content = bytearray((path / "other.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "other.safetensors").write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"other\.safetensors"):
        SafeCheckpointIO().load_checkpoint(path)


def test_state_outside_the_accepted_forms_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="PosixPath at hyper_parameters/path"):
        save(tmp_path, {"state_dict": {}, "hyper_parameters": {"path": Path("x")}})
    assert list(tmp_path.iterdir()) == []


def test_other_devices_and_options_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, trained_state())
    assert SafeCheckpointIO().load_checkpoint(path, map_location="cpu")
    with pytest.raises(CheckpointError, match="map_location"):
        SafeCheckpointIO().load_checkpoint(path, map_location="meta")
    with pytest.raises(TypeError):
        SafeCheckpointIO().save_checkpoint({}, tmp_path / "x", storage_options={})


def test_a_checkpoint_can_be_removed(tmp_path: Path) -> None:
    path = save(tmp_path, trained_state())
    SafeCheckpointIO().remove_checkpoint(path)
    assert not path.exists()
