"""The 13B recipe on its own code path, shrunk in size alone: ranks, shards, a resume, one file at the end."""

import json

import pytest
import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.format.folder import complete_checkpoints
from mtp_lightning.checkpoint.format.read_shards import ShardReader
from tests.support.runs import ROOT, mtp

RECIPE = str(ROOT / "recipes/paper/13b_n4.yaml")
SMALL = ("debug.shrink=true", "strategy.num_nodes=1", "run.dir=run", "run.cache=cache", "checkpoint.every_steps=3")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_trains_on_four_ranks_goes_on_with_others_and_ends_as_one_file(tmp_path):
    first = mtp("train", RECIPE, *SMALL, "strategy.ranks_per_node=4", "run.steps=6", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    [manifest] = [c.manifest for c in complete_checkpoints(tmp_path / "run/checkpoints") if c.step == 6]
    assert (manifest.world_size, manifest.strategy) == (4, "zero3")
    assert {f"model-{k}-of-00004.safetensors" for k in ("00001", "00002", "00003", "00004")} < set(manifest.files)

    same_step = (
        "strategy.ranks_per_node=2",
        "batch.global_batch_size=16",
        "run.validation_samples=8",
    )  # shrinking goes by ranks
    second = mtp("train", RECIPE, *SMALL, *same_step, "run.steps=8", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "Continuing run after step 6 of 8" in second.stdout
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["steps"] == 8
    assert summary["validation"]["loss"]["4"] > 0

    exported = mtp("export", "run", "--out", "whole", "--format", "consolidated", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    recipe, model = load_model(tmp_path / "whole")
    assert recipe.heads.num_offsets == 4
    reader = ShardReader(tmp_path / "run/checkpoints/step-00000008")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, reader.read(name).view(parameter.shape)), name
