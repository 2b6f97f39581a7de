"""What a machine cannot train is said before any step."""

import pytest
import torch

from mtp_lightning.errors import TrainingError
from mtp_lightning.recipe.sections import OptimizerSection, Recipe
from mtp_lightning.training.device import prepare_device
from mtp_lightning.training.optimizer import build_optimizer
from tests.support.tiny import tiny_model, tiny_recipe


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def recipe(precision="fp32", **strategy):
    return Recipe.model_validate({"run": {"precision": precision}, "strategy": {"kind": "zero3", **strategy}})


@pytest.mark.usefixtures("no_gpu")
def test_what_needs_a_gpu_is_refused_where_auto_finds_none():
    assert prepare_device(recipe()).type == "cpu"
    with pytest.raises(TrainingError, match="needs a GPU to offload from; found none here, with .*optimizer=cpu"):
        prepare_device(recipe(offload_optimizer="cpu"))
    with pytest.raises(TrainingError, match="offload_parameters=cpu"):
        prepare_device(recipe(offload_parameters="cpu"))
    with pytest.raises(TrainingError, match="precision=fp16 needs a GPU"):
        prepare_device(recipe(precision="fp16"))


@pytest.mark.usefixtures("gpu")
def test_a_gpu_may_offload_to_the_host_and_not_to_a_disk_yet(tmp_path):
    assert prepare_device(recipe(precision="fp16", offload_optimizer="cpu")).type == "cuda"
    missing = recipe(offload_optimizer="nvme", nvme_path=str(tmp_path / "gone"))
    with pytest.raises(TrainingError, match="must be a folder on this node.*gone"):
        prepare_device(missing)
    with pytest.raises(TrainingError, match="offloads to cpu only"):
        prepare_device(recipe(offload_optimizer="nvme", nvme_path=str(tmp_path)))


def test_a_learning_rate_of_a_role_without_parameters_is_refused():
    model = tiny_model(tiny_recipe(heads={"kind": "linear", "num_offsets": 1}))
    with pytest.raises(TrainingError, match=r"none in heads\. Remove optimizer\.lr_scale\.heads"):
        build_optimizer(model, OptimizerSection(lr_scale={"heads": 4.0}))
    assert build_optimizer(model, OptimizerSection(lr_scale={"trunk": 4.0}))
