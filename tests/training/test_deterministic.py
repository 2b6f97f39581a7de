"""`run.deterministic`: in force while a run trains, in its ranks too, and gone afterwards."""

import contextlib
import json

import lightning as L
import pytest
import torch

from mtp_lightning import MtpDataModule, MtpLightningModule
from mtp_lightning.errors import TrainingError
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training.strategies.deterministic import deterministic_kernels
from tests.support.deterministic_ranks import in_force
from tests.support.ranked import on_ranks
from tests.support.runs import ROOT
from tests.support.tiny import tiny_recipe

RECIPE = ROOT / "recipes/debug/parallel.yaml"
ON = [True, True, True, ":4096:8"]
OFF = [False, False, True, None]
FIELDS = ["run.steps=2", "run.validate_every_steps=2", "run.validation_samples=2", "run.deterministic=true"]
asked = tiny_recipe(run={"deterministic": True})


@pytest.fixture(autouse=True)
def no_variable(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that what a test leaves is taken back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")


def test_flags_hold_in_the_body_and_what_was_set_before_comes_back():
    with contextlib.suppress(KeyError), deterministic_kernels(asked):
        assert in_force() == ON
        assert not torch.utils.deterministic.fill_uninitialized_memory
        raise KeyError
    assert in_force() == OFF
    assert torch.utils.deterministic.fill_uninitialized_memory
    with deterministic_kernels(tiny_recipe()):
        assert in_force() == OFF
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with deterministic_kernels(asked):
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_variable_of_the_users_own_stays_or_is_refused(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic_kernels(asked):
        assert in_force()[-1] == ":16:8"
    assert in_force()[-1] == ":16:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(TrainingError, match=r"must be :4096:8 or :16:8 .*; found :0:0"), deterministic_kernels(asked):
        pass
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(TrainingError, match="before CUDA starts"), deterministic_kernels(asked):
        pass
    assert in_force() == OFF


def test_one_run_follows_another_where_cuda_has_started_in_the_first(monkeypatch):
    with deterministic_kernels(asked):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert in_force() == [*OFF[:3], ":4096:8"]
    with deterministic_kernels(asked):
        assert in_force() == ON


@pytest.mark.slow
def test_every_rank_trains_with_it(tmp_path):
    fields = [
        *FIELDS,
        "run.device=cpu",
        f"run.cache={tmp_path}/cache",
        "strategy.kind=zero2",
        "strategy.ranks_per_node=2",
        f"run.dir={tmp_path}/run",
    ]
    on_ranks("tests.support.deterministic_ranks", 2, str(RECIPE), str(tmp_path), *fields)
    for rank in (0, 1):
        facts = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert len(facts["steps"]) >= 2
        assert all(own == ON for own in facts["steps"])
        assert facts["after"] == OFF


class Watch(L.Callback):
    """Notes what is in force in every step, and may end the run."""

    def __init__(self, fails):
        self.seen, self.fails = [], fails

    def on_train_batch_start(self, *_):
        self.seen.append(in_force())
        if self.fails:
            raise KeyError("ended")


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # Lightning 2.6 with torch 2.13
@pytest.mark.parametrize("fails", [False, True])
def test_a_trainer_of_the_users_own_gets_its_settings_back(tmp_path, fails):
    recipe = load_recipe(RECIPE, [*FIELDS, f"run.dir={tmp_path}/run", f"run.cache={tmp_path}/cache"]).recipe
    watch = Watch(fails)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(KeyError) if fails else contextlib.nullcontext():
        trainer.fit(MtpLightningModule(recipe), datamodule=MtpDataModule(recipe))
    assert watch.seen
    assert all(own == ON for own in watch.seen)
    assert in_force() == OFF
