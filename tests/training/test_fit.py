"""A run as a user sees it: what is written, when, and what is refused."""

import fcntl
import json
import shutil
import signal
import time

import pytest

from mtp_lightning.checkpoint.format.folder import complete_checkpoints
from mtp_lightning.errors import CheckpointError, DataError, NonFiniteError, RunFolderError, TrainingError
from mtp_lightning.launch.run_marker import claim
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training import lightning_module
from mtp_lightning.training.fit import train
from tests.support import warm
from tests.support.runs import ROOT, figures, last_step


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def start(*overrides, recipe="parallel", folder="run"):
        defaults = ("run.steps=11", "run.validate_every_steps=5", "checkpoint.every_steps=4", "run.threads=1")
        path = ROOT / f"recipes/debug/{recipe}.yaml"
        return train(load_recipe(path, [*defaults, f"run.dir={folder}", f"run.cache={cache}", *overrides]))

    return start


def test_steps_checkpoints_and_validations_fall_where_they_should(run, tmp_path):
    assert run("logging.every_steps=2", "logging.curves=true") == 0
    rows = figures(tmp_path / "run/metrics.csv")
    assert [int(row["step"]) for row in rows] == [2, 4, 5, 6, 8, 10, 11]
    assert [int(row["step"]) for row in rows if row["val/loss_1"]] == [5, 10, 11]
    assert [int(row["step"]) for row in rows if row["train/loss_4"]] == [2, 4, 6, 8, 10, 11]
    found = complete_checkpoints(tmp_path / "run/checkpoints")
    assert [checkpoint.step for checkpoint in found] == [8, 11]
    assert json.loads((tmp_path / "run/summary.json").read_text())["is_finished"]
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {"recipe.yaml", "curves.png", "tensorboard", "logs"}
    assert (tmp_path / "run/logs/attempt_1/environment.json").exists()


def test_the_written_recipe_is_the_run(run, tmp_path, capsys):
    run("run.steps=2")
    assert "run/summary.json, metrics.csv" in capsys.readouterr().out
    assert not (tmp_path / "run/curves.png").exists()  # which recipes for debugging do not ask for
    assert train(load_recipe(tmp_path / "run/recipe.yaml")) == 0
    assert "is finished: 2 of 2 steps" in capsys.readouterr().out


def test_a_changed_recipe_is_reported_field_by_field(run, capsys):
    run("run.steps=2")
    with pytest.raises(RunFolderError) as caught:
        run("model.hidden_size=64", "optimizer.lr=1e-2", "run.steps=20")
    assert "2 changed fields" in caught.value.found
    assert "model.hidden_size: 32 -> 64" in caught.value.found
    assert "optimizer.lr: 0.003 -> 0.01" in caught.value.found
    assert "run.steps" not in caught.value.found
    assert run("run.steps=3", "batch.micro_batch_size=8") == 0
    printed = capsys.readouterr().out
    assert "Changed since this run began: batch.micro_batch_size: 4 -> 8" in printed
    assert "Changed since this run began: run.steps: 2 -> 3" in printed
    assert "Continuing run after step 2 of 3" in printed


def test_a_run_without_a_checkpoint_may_be_corrected(run):
    with pytest.raises(DataError):
        run("data.corpus=[nowhere.txt]")
    assert run("run.steps=2") == 0


def test_a_fresh_start_overwrites_nothing(run, tmp_path, capsys):
    run("run.steps=2")
    first = (tmp_path / "run/metrics.csv").read_bytes()
    assert run("run.restart=true", "run.seed=3", "run.steps=2") == 0
    assert "the earlier run is now run.1" in capsys.readouterr().out
    assert (tmp_path / "run.1/metrics.csv").read_bytes() == first
    assert (tmp_path / "run/metrics.csv").read_bytes() != first


def test_folders_of_others_are_refused(run, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("precious")
    with pytest.raises(RunFolderError, match=r"one that a run has made .* a folder that holds thesis.tex"):
        run(folder="home")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="which is a file"):
        run(folder="file")
    claim(tmp_path / "run")
    with (tmp_path / "run/.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunFolderError, match="one process at a time"):
            run()


def test_divergence_stops_the_run_and_keeps_the_last_checkpoint(run, tmp_path):
    with pytest.raises(NonFiniteError, match="every loss and every gradient must be finite") as caught:
        run("optimizer.lr=1e15", "optimizer.max_grad_norm=null", "optimizer.warmup_steps=0", "checkpoint.every_steps=1")
    assert caught.value.exit_code == 88
    assert complete_checkpoints(tmp_path / "run/checkpoints")


def test_another_number_of_processes_is_refused_before_anything_is_written(run, tmp_path):
    with pytest.raises(TrainingError, match="1 started, 2 in the recipe"):
        run("strategy.kind=zero2", "strategy.ranks_per_node=2", "batch.micro_batch_size=1")
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_smaller_than_a_token_is_refused_before_the_first_step(run, tmp_path):
    with pytest.raises(DataError, match=r"model\.vocab_size"):
        run("model.vocab_size=100")
    assert not (tmp_path / "run/metrics.csv").exists()


def test_a_shard_cut_in_half_is_refused_before_the_first_step(run, tmp_path, cache):
    run("run.steps=1", folder="whole")
    [built] = cache.glob("data-*")
    broken = tmp_path / "broken"
    shutil.copytree(built, broken)
    [shard] = (broken / "train").glob("*.tar")
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(DataError, match=shard.name):
        run(f"data.shards={broken}", folder="cut")


def test_data_of_another_corpus_is_refused_on_resume(run, tmp_path, cache):
    run("run.steps=2")
    [first] = cache.glob("data-*")
    run("data.corpus=[stdlib:json,stdlib:logging]", "run.steps=1", folder="elsewhere")
    [other] = set(cache.glob("data-*")) - {first}
    with pytest.raises(CheckpointError, match="fingerprint"):
        run("run.steps=20", f"data.shards={other}")


def test_ctrl_c_ends_with_its_own_code_and_a_checkpoint(tmp_path, cache):
    settings = ("run.steps=5000", "logging.every_steps=1", "run.dir=run", f"run.cache={cache}")
    process = warm.start("train", str(ROOT / "recipes/debug/parallel.yaml"), *settings, cwd=tmp_path, merged=True)
    while last_step(tmp_path / "run/metrics.csv") < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "The same command goes on" in output
    [checkpoint] = complete_checkpoints(tmp_path / "run/checkpoints")
    assert checkpoint.step >= 3


def test_prompts_are_never_targets(run, tmp_path, monkeypatch):
    """Train on pairs whose prompts hold bytes that answers never hold: no target is one of them."""
    lines = [json.dumps({"prompt": "QQQ" * (i % 5 + 1), "completion": f"answer {i} " * 8}) for i in range(200)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    seen = []
    check = lightning_module.check_targets

    def spying(tokens, documents, mask, targets):
        seen.append((tokens, mask, targets))
        check(tokens, documents, mask, targets)

    monkeypatch.setattr(lightning_module, "check_targets", spying)
    assert run(f"data.corpus=[{tmp_path}/pairs.jsonl]", "run.steps=1") == 0
    tokens, mask, targets = seen[0]
    assert (tokens == ord("Q")).any()
    assert not (targets == ord("Q")).any()
    assert ((tokens == ord("Q")) == ~mask).all()
