"""Folders in Mistral's own layout: params.json as Meta writes it, with more fields."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.errors import CheckpointError
from tests.checkpoint.meta_model import write_meta


def write(folder: Path, **changes: Any) -> Path:
    write_meta(folder)
    path = folder / "params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_the_width_of_a_head_may_be_told(tmp_path: Path) -> None:
    told = json.loads((write(tmp_path / "plain") / "params.json").read_text())
    width = told["dim"] // told["n_heads"]
    import_folder(write(tmp_path / "a", head_dim=width, sliding_window=4096), tmp_path / "ours", Wanted())
    import_folder(write(tmp_path / "b", vocab_size=-1, use_scaled_rope=False), tmp_path / "other", Wanted())
    ours, other = (dict(load_model(tmp_path / name)[1].named_parameters()) for name in ("ours", "other"))
    assert all(torch.equal(one, other[name]) for name, one in ours.items())
    with pytest.raises(CheckpointError, match="instead of"):
        import_folder(write(tmp_path / "c", head_dim=2 * width), tmp_path / "wide", Wanted())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_scaled_rope", True),
        ("yarn", {"factor": 4}),
        ("moe", {"num_experts": 8}),
        ("quantization", {"qformat_weight": "fp8_e4m3"}),
        ("sliding_window", 64),
        ("head_dim", 10**9),
        ("head_dim", "x"),
        ("head_dim", [4]),
    ],
)
def test_what_the_model_here_is_not_is_refused_by_name(name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as failure:
        import_folder(write(tmp_path / "meta", **{name: value}), tmp_path / "ours", Wanted())
    assert name in str(failure.value) or "channels of all query heads" in str(failure.value)
    assert "params.json" in str(failure.value)
