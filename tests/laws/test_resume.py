"""Law 9: killed with SIGKILL at random moments and started again = never killed; losses and weights to the bit."""

import json
import random
from hashlib import sha256

import pytest

from tests.support.architectures import settings_of
from tests.support.runs import ROOT, figures, last_step, mtp, mtp_killed

STEPS = 60
RUN = (f"run.steps={STEPS}", "checkpoint.every_steps=7", "run.validate_every_steps=20", "logging.every_steps=3")


def train(cwd, name, *extra):
    recipe = str(ROOT / "recipes/debug/sequential.yaml")
    return ("train", recipe, *RUN, f"run.dir={name}", f"run.cache={cwd}/cache", *extra)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("runs")
    done = mtp(*train(cwd, "whole"), cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert last_step(cwd / "whole/metrics.csv") == STEPS
    return cwd


def final_weights(cwd, name):
    """Digest of the last checkpoint's weights: short, so that a failed comparison is too."""
    checkpoint = cwd / name / f"checkpoints/step-{STEPS:08d}"
    return sha256((checkpoint / "model-00001-of-00001.safetensors").read_bytes()).hexdigest()


def kill_and_resume(cwd, name, num_kills, seed, *extra):
    draw = random.Random(seed)
    metrics = cwd / name / "metrics.csv"
    for kill in range(num_kills):
        # After the first checkpoint, and far enough from the end for the kill to find a running process.
        after_step = min(STEPS // 2, max(10, last_step(metrics) + draw.randint(1, 20)))
        assert mtp_killed(*train(cwd, name, *extra), cwd=cwd, metrics=metrics, after_step=after_step, seed=kill) == -9
    done = mtp(*train(cwd, name, *extra), cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert f"Continuing {name} after step" in done.stdout
    assert final_weights(cwd, name) == final_weights(cwd, "whole")
    assert figures(cwd / name / "metrics.csv") == figures(cwd / "whole/metrics.csv")


def test_killed_runs_go_on_exactly(uninterrupted):
    kill_and_resume(uninterrupted, "killed", num_kills=1, seed=1)


@pytest.mark.parametrize(
    "seed", [pytest.param(n, marks=(pytest.mark.slow, pytest.mark.matrix)[n > 1]) for n in range(4)]
)
def test_many_kills(uninterrupted, seed):
    kill_and_resume(uninterrupted, f"killed_{seed}", num_kills=5, seed=seed)


@pytest.mark.slow
def test_another_seed_gives_other_weights(uninterrupted):
    """The comparison above can fail."""
    done = mtp(*train(uninterrupted, "other", "run.seed=1"), cwd=uninterrupted)
    assert done.returncode == 0, done.stderr
    assert final_weights(uninterrupted, "other") != final_weights(uninterrupted, "whole")
    assert figures(uninterrupted / "other/metrics.csv") != figures(uninterrupted / "whole/metrics.csv")


@pytest.mark.slow
def test_killed_runs_saved_by_the_clock_go_on_exactly(uninterrupted):
    by_clock = ("checkpoint.every_steps=null", "checkpoint.every_minutes=0.002")
    kill_and_resume(uninterrupted, "by_clock", 3, 9, *by_clock)
    names = [path.name for path in (uninterrupted / "by_clock/checkpoints").glob("step-*")]
    assert any(int(name[5:]) % 7 for name in names), names


@pytest.mark.slow
def test_killed_runs_on_a_decoder_of_transformers_go_on_exactly(tmp_path):
    pytest.importorskip("transformers", reason="needs transformers: pip install 'mtp_lightning[transformers]'")
    settings = settings_of("mixtral", vocab_size=257)
    sections = {
        "model": {"family": "transformers", "hf_config": settings},
        "heads": {"kind": "sequential", "num_offsets": 3, "layers_from_trunk": False},
        "data": {"corpus": ["stdlib:json"], "seq_len": 32, "validation_fraction": 0.2},
        "batch": {"global_batch_size": 4, "micro_batch_size": 2},
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(sections))

    def run(name):
        return ("train", str(recipe), *RUN, f"run.dir={name}", "run.cache=cache", "run.device=cpu")

    done = mtp(*run("whole"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = tmp_path / "killed/metrics.csv"
    assert mtp_killed(*run("killed"), cwd=tmp_path, metrics=metrics, after_step=20, seed=1) == -9
    done = mtp(*run("killed"), cwd=tmp_path)
    assert "Continuing killed after step" in done.stdout
    assert final_weights(tmp_path, "killed") == final_weights(tmp_path, "whole")
    assert figures(metrics) == figures(tmp_path / "whole/metrics.csv")
