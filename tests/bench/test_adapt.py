"""`mtp bench adapt`: recipes from one imported model, killed, interrupted, gone on with, and judged alike."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from typer.testing import CliRunner

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.huggingface.export_model import export_hf
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.cli.app import app
from mtp_lightning.data.loading.factory import prepare_data
from mtp_lightning.evaluation.comparison import spread
from mtp_lightning.evaluation.marginal import measure_marginal
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training.fit import train
from tests.checkpoint.runs import save_run
from tests.support.tiny import tiny_recipe

SHARED = """
heads: {{num_offsets: 2, kind: parallel, layers_from_trunk: false}}
data: {{corpus: [{here}/corpus], seq_len: 24, validation_fraction: 0.2}}
batch: {{global_batch_size: 8, micro_batch_size: 8}}
optimizer: {{lr: 1.0e-2, warmup_steps: 0}}
run: {{cache: {here}/cache, steps: 16, log_every_steps: 16, validate_every_steps: 16, validation_samples: 4,
      checkpoint_every_steps: 4, threads: 1, device: cpu}}
"""
RECIPES = {
    "phased": "phases: {heads: {freeze: [trunk, unembedding], run: {steps: 4}}, joint: {}}",
    "joint": "objective: {weights: {kind: constant, values: [1, 0.5]}}",
    "wreck": "logging: {every_steps: 2}\nhealth: {drift: {every_steps: 2, stop_loss: 1.0e-6}}\noptimizer: {lr: 5.0}",
    "faulty": "run: {stepz: 3}\nheads: {num_offsets: 0}",
    "other_texts": "data: {seq_len: 28}",
}
SEEDS = ("--seeds", "2")
MEASURED = {"num_samples": 12, "last_tokens": 4}
MEASURING = ("--samples", "12", "--last", "4", "--device", "cpu")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with an imported model, its data and recipes."""
    folder = tmp_path_factory.mktemp("adapt")
    (folder / "corpus").mkdir()
    for number in range(60):
        (folder / f"corpus/{number}.txt").write_text(f"text {number} is number {number**2} of " * 8)
    plain = tiny_recipe(
        model={"vocab_size": 257},
        heads={"num_offsets": 1},
        data={"corpus": [str(folder / "corpus")], "seq_len": 24, "validation_fraction": 0.2},
        run={"dir": str(folder / "plain"), "cache": str(folder / "cache")},
    )
    prepare_data(plain)
    for step, name in ((1, "base"), (2, "another")):
        save_run(folder / "plain", plain, step=step)
        export_hf(folder / "plain", folder / f"{name}-hf")
        import_folder(folder / f"{name}-hf", folder / name, Wanted(num_offsets=2, init="random"))
    (folder / "shared.yaml").write_text(SHARED.format(here=folder))
    for name, text in RECIPES.items():
        (folder / f"{name}.yaml").write_text(f"extends: shared.yaml\nname: {name}\n{text}\n")
    return folder


def command(here, *names, base="base", out="runs", options=()):
    recipes = [str(here / f"{name}.yaml") for name in names]
    return ["bench", "adapt", str(here / base), *recipes, "--out", str(here / out), *MEASURING, *options]


def bench(here, *names, **options):
    return CliRunner().invoke(app, command(here, *names, **options))


def steps_in(folder):
    return sorted(int(path.name[5:]) for path in folder.glob("checkpoints/step-*[0-9]"))


def wait_for(folder):
    """Return soon after a run has written its first checkpoint."""
    until = time.monotonic() + 120
    while not steps_in(folder) and time.monotonic() < until:
        time.sleep(0.002)


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def compared(here):
    """Two recipes and two seeds: killed in a phase, interrupted in a run, and gone on with to the end."""
    options = (*SEEDS, "--json", str(here / "figures.json"), "--plot", str(here / "figures.png"))
    process = subprocess.Popen(
        [sys.executable, "-m", "mtp_lightning", *command(here, "phased", "joint", options=options)],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(here / "runs/phased-0/phases/2-joint")
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # its child is killed by the kernel, and lets go of the folder
    killed_at = steps_in(here / "runs/phased-0/phases/2-joint")[-1]

    def interrupt():
        wait_for(here / "runs/joint-0")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    interrupted = bench(here, "phased", "joint", options=options)
    thread.join()
    interrupted_at = steps_in(here / "runs/joint-0")[-1]
    finished = bench(here, "phased", "joint", options=options)
    return {
        "killed_at": killed_at,
        "interrupted": interrupted,
        "interrupted_at": interrupted_at,
        "finished": finished,
        "figures": json.loads((here / "figures.json").read_text()),
    }


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_comparison_goes_on_after_a_kill_and_an_interrupt(here, compared):
    assert compared["killed_at"] < 16
    assert compared["interrupted"].exit_code == 130
    assert compared["interrupted_at"] < 16
    assert "Run 2 of 4: joint, seed 0, in " in compared["interrupted"].stderr
    assert "Run 3 of 4" not in compared["interrupted"].stderr
    assert compared["finished"].exit_code == 0, compared["finished"].output
    starts = [path.parts[-3] for path in here.glob("runs/*/logs/attempt_*")]
    assert sorted(starts) == ["joint-0", "joint-0", "joint-1", "phased-0", "phased-0", "phased-1"]


def test_the_figures_are_those_of_runs_that_nobody_disturbed(here, compared):
    """The other way: `mtp train` and `mtp eval marginal` of one recipe after the other."""
    for figures in compared["figures"]["runs"]:
        name, seed = figures["recipe"], figures["seed"]
        run = here / f"runs/{name}-{seed}"
        if seed == 0:
            own = here / f"alone/{name}"
            overrides = [f"{here}/{name}.yaml", f"run.dir={own}", f"init.path={here}/base"]
            assert train(load_recipe(here / "base/recipe.yaml", overrides)) == 0
            weights, expected = (dict(load_model(path)[1].named_parameters()) for path in (run, own))
            assert all(torch.equal(weights[key], expected[key]) for key in expected)
            run = own
        report = json.loads(json.dumps(measure_marginal(run, **MEASURED).as_json()))
        assert figures["report"] == report
        assert figures["failure"] is None
    assert [(run["recipe"], run["seed"]) for run in compared["figures"]["runs"]] == [
        ("phased", 0),
        ("joint", 0),
        ("phased", 1),
        ("joint", 1),
    ]
    checkpoints = [run["checkpoint"] for run in compared["figures"]["runs"][:2]]
    assert checkpoints == ["phased-0/phases/2-joint/checkpoints/step-00000016", "joint-0/checkpoints/step-00000016"]


def test_the_table_holds_means_over_seeds(compared):
    figures = compared["figures"]
    lines = compared["finished"].stdout.splitlines()
    assert lines[0].startswith("Adaptations of ")
    tops = set()
    for row in figures["recipes"]:
        reports = [run["report"] for run in figures["runs"] if run["recipe"] == row["recipe"]]
        seen = [
            spread([report["offsets"][offset][key] for report in reports])
            for offset, key in ((0, "head_top"), (1, "head_top"), (1, "marginal_top"))
        ]
        (line,) = [line for line in lines if line.startswith(row["recipe"])]
        assert line.split() == [row["recipe"], "2", *" ".join(f"{s.mean:.3f} ±{s.margin:.3f}" for s in seen).split()]
        assert row["offsets"][1]["head"] == seen[1]._asdict()
        assert row["offsets"][1]["marginal"] == seen[2]._asdict()
        tops |= {one.mean for one in seen}
    assert len(tops) >= 4
    assert max(tops) > 0


def test_a_second_call_trains_and_measures_nothing(here, compared, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    monkeypatch.setattr("mtp_lightning.bench.adapt_measuring.measure_marginal", None)
    again = bench(here, "phased", "joint", options=(*SEEDS, "--json", str(here / "again.json")))
    assert again.exit_code == 0, again.output
    assert json.loads((here / "again.json").read_text()) == compared["figures"]
    assert again.stdout.splitlines()[:8] == compared["finished"].stdout.splitlines()[:8]


@pytest.mark.usefixtures("compared")
def test_other_settings_are_measured_anew(here):
    path = here / "top.json"
    done = bench(here, "joint", options=("--top", "9", "--json", str(path)))
    assert done.exit_code == 0, done.output
    (figures,) = json.loads(path.read_text())["runs"]
    expected = measure_marginal(here / "runs/joint-0", top=9, **MEASURED)
    assert figures["report"]["offsets"][1]["head_top"] == expected.offsets[1].head_top
    assert "top-9" in done.stdout
    assert "single seed" in done.stdout


@pytest.mark.usefixtures("compared")
def test_a_run_that_fails_is_reported_and_the_others_are_there(here):
    path = here / "wreck.json"
    done = bench(here, "wreck", "joint", options=("--json", str(path), "--plot", str(here / "wreck.png")))
    assert done.exit_code == 5
    wreck, joint = json.loads(path.read_text())["runs"]
    assert wreck["failure"].startswith("the main head must stay as good as the model that the run started from; found")
    assert "health.drift.stop_loss crossed at step 2" in wreck["failure"]
    assert wreck["report"] is None
    assert joint["report"] is not None
    assert any(line.split()[:5] == ["wreck", "0", "of", "1", "failed"] for line in done.stdout.splitlines())
    assert any(line.startswith("wreck, seed 0 failed: the main head") for line in done.stdout.splitlines())
    assert "1 of 2 failed: wreck, seed 0" in done.stderr
    assert (here / "wreck.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("compared")
def test_the_picture_is_there(here):
    assert (here / "figures.png").stat().st_size > 10_000


REFUSED = {
    "no folder": ({"base": "nowhere", "names": ["joint"]}, 3, "no folder"),
    "no base": ({"base": "corpus", "names": ["joint"]}, 3, "no recipe.yaml"),
    "no model": ({"base": "hollow", "names": ["joint"]}, 3, "neither checkpoints/"),
    "no recipes": ({"names": []}, 2, "RECIPE must be given at least once"),
    "a fault after a good one": ({"names": ["joint", "faulty"]}, 2, "run.stepz"),
    "no such recipe": ({"names": ["joint", "jiont"]}, 2, "nearest  "),
    "given twice": ({"names": ["joint", "joint"]}, 2, "RECIPE must differ between the recipes compared"),
    "equal names": ({"names": ["joint", "twin"]}, 2, "name must differ between the recipes compared"),
    "its own fields": ({"names": ["joint"], "options": ["run.dir=x"]}, 2, "run.dir must be left to the comparison"),
    "other texts": ({"names": ["joint", "other_texts"]}, 87, "on the same held-out texts"),
    "few tokens": ({"names": ["joint"], "options": ["--last", "99"]}, 87, "Lower --last"),
    "no sense": ({"names": ["joint"], "options": ["--nucleus", "0"]}, 7, "--nucleus must lie above 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(here, case, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    (here / "hollow").mkdir(exist_ok=True)
    (here / "hollow/recipe.yaml").write_bytes((here / "base/recipe.yaml").read_bytes())
    (here / "twin.yaml").write_text("extends: joint.yaml\n")
    given, code, said = REFUSED[case]
    given = dict(given)
    done = bench(here, *given.pop("names"), out="refused", **given)
    assert done.exit_code == code, done.output
    assert said in done.stderr
    assert "found" in done.stderr
    assert "hint" in done.stderr
    assert not list(here.glob("refused/*-0"))


@pytest.mark.usefixtures("compared")
def test_runs_of_another_base_or_recipe_are_not_mixed_in(here, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    other = bench(here, "joint", base="another")
    assert other.exit_code == 4
    assert "all runs of a comparison must start from the same model" in other.stderr
    changed = bench(here, "joint", options=("optimizer.lr=1e-3",))
    assert changed.exit_code == 4
    assert "optimizer.lr" in changed.stderr
