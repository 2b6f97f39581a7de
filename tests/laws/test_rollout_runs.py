"""Whole runs with on-policy training: the same on two ranks of every stage of ZeRO, and after a kill."""

import pytest
import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from tests.laws.test_distillation import RUN, STAGES
from tests.laws.test_resume import kill_and_resume, train
from tests.support.runs import ROOT, figures, mtp


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("sequential", "objective.rollout={probability: 0.5}"),
        ("recursive", "objective.rollout={where: reached, warmup_steps: 3, start: 0.3}"),
        ("recursive", "objective={backward_order: bridged, rollout: {}, distill: {beta: [1.0]}}"),
    ],
)
def test_training_on_two_ranks_is_that_on_one(tmp_path, kind, fields):
    recipe = str(ROOT / f"recipes/debug/{kind}.yaml")
    strategies = {"single": (), **{stage: (f"strategy.kind={stage}", "strategy.ranks_per_node=2") for stage in STAGES}}
    weights, shares = {}, {}
    for name, spread in strategies.items():
        done = mtp("train", recipe, *RUN, fields, *spread, f"run.dir={name}", cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        weights[name] = dict(load_model(tmp_path / name)[1].named_parameters())
        shares[name] = [row["train/off_text_4"] for row in figures(tmp_path / name / "metrics.csv")]
    for stage in STAGES:
        assert shares[stage] == shares["single"]
        for name, value in weights["single"].items():
            torch.testing.assert_close(weights[stage][name], value, rtol=1e-3, atol=2e-4, msg=f"{stage} {name}")


@pytest.mark.slow
def test_a_killed_run_draws_the_same(tmp_path):
    drawn = "objective.rollout={probability: 0.7, warmup_steps: 40}"
    done = mtp(*train(tmp_path, "whole", drawn), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kill_and_resume(tmp_path, "killed", 2, 1, drawn)
