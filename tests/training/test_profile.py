"""`mtp train --profile`: a trace that tools read, a table on screen, nothing where it was not asked for."""

import gzip
import json

import pytest
from typer.testing import CliRunner

from mtp_lightning.cli.app import app
from tests.support.runs import ROOT


def train(folder, *arguments):
    recipe = str(ROOT / "recipes/debug/parallel.yaml")
    fields = ("run.steps=4", f"run.dir={folder}/run", f"run.cache={folder}/cache", "optimizer.warmup_steps=0")
    return CliRunner().invoke(app, ["train", recipe, *fields, *arguments])


def test_some_steps_are_profiled_and_the_rest_is_not(tmp_path):
    done = train(tmp_path, "--profile", "2-3")
    assert done.exit_code == 0, done.output
    with gzip.open(tmp_path / "run/profile/rank-0.json.gz") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert names.count("step: optimizer") == 2
    assert "aten::mm" in names
    text = (tmp_path / "run/profile/rank-0.txt").read_text()
    assert "Steps 2 to 3, milliseconds per step" in done.output
    for part in ("data", "forward, backward, reduction", "backward", "optimizer", "Self CPU %"):
        assert part in text
    rows = [line for line in text.splitlines() if line.count("%") >= 2 and "Self CPU %" not in line]
    assert len(rows) == 10
    assert not any("step: " in row for row in rows)


def test_a_run_that_is_beyond_these_steps_says_so(tmp_path):
    assert train(tmp_path, "run.steps=3").exit_code == 0
    done = train(tmp_path, "run.steps=4", "--profile", "2-3")
    assert done.exit_code == 0, done.output
    assert "No profile: the run goes on after step 3" in done.output
    assert not (tmp_path / "run/profile").exists()


@pytest.mark.parametrize("steps", ["3-2", "4-5", "0-1", "2", "a-b", "1-2-3", "-1-2"])
def test_steps_that_are_none_are_a_fault(tmp_path, steps):
    done = train(tmp_path, f"--profile={steps}")
    assert done.exit_code == 2
    assert "debug.profile_steps" in done.output.replace("\n", "") + done.stderr
    assert not (tmp_path / "run").exists()
