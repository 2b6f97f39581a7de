"""What a machine cannot train is said before any step."""

from types import SimpleNamespace

import pytest
import torch

from mtp_lightning.errors import TrainingError
from mtp_lightning.launch.rank_env import local_rank_info
from mtp_lightning.recipe.schema.root import OptimizerSection, Recipe
from mtp_lightning.training.step.optimizer import build_optimizer
from mtp_lightning.training.strategies.device import check_own_device, prepare_device
from tests.support.tiny import tiny_model, tiny_recipe


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def gpu(monkeypatch):
    """Eight of them; yields the list of those made current."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def recipe(precision="fp32", kind="zero3", **strategy):
    return Recipe.model_validate({"run": {"precision": precision}, "strategy": {"kind": kind, **strategy}})


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


@pytest.mark.parametrize(
    ("kind", "local_rank", "visible", "index"),
    [("zero3", 5, 8, 5), ("zero3", 5, 1, 0), ("zero1", 3, 2, 1), ("zero2", 0, 8, 0), ("single", 5, 8, 0)],
    ids=["all seen", "bound to one", "bound to two", "first", "alone"],
)
def test_every_rank_takes_a_gpu_that_it_sees_and_makes_it_current(gpu, monkeypatch, kind, local_rank, visible, index):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    for name, value in local_rank_info(local_rank, 8, 10_000).environment.items():
        monkeypatch.setenv(name, value)
    assert prepare_device(recipe(kind=kind)) == torch.device("cuda", index)
    assert gpu == [torch.device("cuda", index)]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("sections", "is_left"),
    [
        ({}, True),
        ({"data": {"document_mask": True}}, False),
        ({"data": {"document_mask": True}, "run": {"precision": "bf16"}}, True),  # attended to one by one
        ({"heads": {"kind": "sequential"}, "objective": {"rollout": {}}}, False),
    ],
    ids=["window", "masked", "one by one", "two streams"],
)
def test_cudnn_attends_where_there_is_no_mask(sections, is_left):
    try:
        prepare_device(Recipe.model_validate(sections))
        assert torch.backends.cuda.cudnn_sdp_enabled() == is_left
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


class Gathered:
    """Ranks of which each has said what GPU it has."""

    def __init__(self, *gpus):
        self.gpus = gpus

    def gather(self, own):
        return list(self.gpus)


def test_two_ranks_on_one_gpu_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    cuda = torch.device("cuda", 0)
    check_own_device(Gathered(("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1")), cuda)
    with pytest.raises(
        TrainingError, match=r"a GPU of its own; found one GPU for ranks 0, 2 on a; one for .*1, 3 on b"
    ):
        check_own_device(Gathered(("a", "GPU-1"), ("b", "GPU-1"), ("a", "GPU-1"), ("b", "GPU-1")), cuda)
    check_own_device(Gathered(), torch.device("cpu"))


def test_a_learning_rate_of_a_role_without_parameters_is_refused():
    model = tiny_model(tiny_recipe(heads={"kind": "linear", "num_offsets": 1}))
    with pytest.raises(TrainingError, match=r"none in heads\. Remove optimizer\.lr_scale\.heads"):
        build_optimizer(model, OptimizerSection(lr_scale={"heads": 4.0}))
    assert build_optimizer(model, OptimizerSection(lr_scale={"trunk": 4.0}))
