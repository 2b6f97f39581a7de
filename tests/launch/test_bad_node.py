"""A broken GPU is the machine's fault: exit code 86, and the machine's name where the job script looks for it."""

import pytest

from mtp_lightning.errors import BadNodeError
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training import lightning_module
from mtp_lightning.training.fit import train
from tests.support.runs import ROOT


def break_at_first_step(monkeypatch, words):
    def accumulate_gradients(*arguments):
        raise RuntimeError(words)

    monkeypatch.setattr(lightning_module, "accumulate_gradients", accumulate_gradients)


def start(folder):
    fields = [f"run.dir={folder}/run", f"run.cache={folder}/cache", "run.steps=2", "run.threads=1"]
    return train(load_recipe(ROOT / "recipes/debug/parallel.yaml", fields))


def test_a_broken_gpu_names_its_node(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-017")
    break_at_first_step(monkeypatch, "CUDA error: uncorrectable ECC error encountered\nmore")
    with pytest.raises(BadNodeError, match="gpu-017: CUDA error: uncorrectable ECC") as caught:
        start(tmp_path)
    assert caught.value.exit_code == 86
    assert (tmp_path / "run/logs/bad_nodes").read_text() == "gpu-017\n"


def test_any_other_error_stays_what_it_is(tmp_path, monkeypatch):
    break_at_first_step(monkeypatch, "CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        start(tmp_path)
    assert not (tmp_path / "run/logs/bad_nodes").exists()
