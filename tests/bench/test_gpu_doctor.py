"""`mtp doctor --gpu`: its parts, on the CPU in the place of the device, and what it does without one."""

import json

import pytest
import torch

from mtp_lightning.bench import gpu
from mtp_lightning.cli import doctor
from tests.support.runs import mtp

CPU = torch.device("cpu")


def test_without_a_gpu_it_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = mtp("doctor", "--gpu", "--json", str(tmp_path / "gpu.json"), cwd=tmp_path)
    assert done.returncode != 0
    assert "needs a CUDA device" in done.stderr
    assert not (tmp_path / "gpu.json").exists()
    assert "goes with --gpu only" in mtp("doctor", "--json", "x", cwd=tmp_path).stderr


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in gpu.PARTS])
def test_a_part_measures_and_is_told(warm_ranks, name):
    found = gpu.run_part(name, "cpu", 300)
    assert "failure" not in found, found
    assert all(isinstance(line, str) and line for line in doctor.LINES[name](found))
    if name == "strategies":
        assert found["not_equal"] == []
        assert found["cells"] > 10
        assert found["worst_error"] < 1e-5
    if name == "device":
        assert "KeyError: 'nothing'" in gpu.run_part("nothing", "cpu", 300)["failure"]
    if name == "training":
        assert [row["num_offsets"] for row in found["figures"]] == [1, 4]
        assert all(row["step_s"] > 0 for row in found["figures"])
    if name == "decoding":
        assert sum(way["all_accepted"] for way in found["ways"]) == 1
    if name == "compiled":
        assert [way["compiled"] for way in found["ways"]] == [False, True] * 2
        assert all(way["same_text"] and way["tokens_per_s"] > 0 for way in found["ways"])


def test_a_part_that_stops_or_hangs_is_a_reason(monkeypatch, tmp_path, capsys):
    assert gpu.run_part("device", "cpu", 0.1)["failure"] == "not done after 0.1 s"
    monkeypatch.setattr(gpu, "examine", lambda on_part: {name: {"failure": f"no {name}"} for name in gpu.PARTS})
    assert not doctor.examine_gpu(tmp_path / "gpu.json")
    assert "no decoding" in capsys.readouterr().out
    assert json.loads((tmp_path / "gpu.json").read_text())["training"] == {"failure": "no training"}


def test_one_seed_makes_one_model_whatever_the_device(monkeypatch):
    """No number is drawn by the device's own generator, which is another than the CPU's."""
    devices = set()

    class Watched(torch.Generator):
        def __init__(self, device="cpu"):
            devices.add(torch.device(device).type)

    monkeypatch.setattr(torch, "Generator", Watched)
    gpu.build_model(gpu.shape_of_cpu(), "meta")
    assert devices == {"cpu"}
