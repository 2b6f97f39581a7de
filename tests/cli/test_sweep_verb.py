"""`mtp sweep` of real runs: killed, interrupted, stopped and gone on with; equal to single runs, and compared."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.cli.app import app
from mtp_lightning.evaluation.marginal import measure_marginal
from mtp_lightning.evaluation.spread import spread
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training.fit import train
from tests.cli.test_submit_verb import pretend_sbatch
from tests.support import warm
from tests.support.runs import ROOT, figures

# twelve real runs, killed and gone on with, which all tests share; tests/launch/test_sweep.py plans them
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("sweep")]

SHARED = f"""
extends: {ROOT}/recipes/debug/sequential.yaml
heads: {{num_offsets: 2}}
run: {{cache: cache, steps: 24, validate_every_steps: 12, validation_samples: 4, threads: 1, device: cpu}}
checkpoint: {{every_steps: 4}}
logging: {{every_steps: 8}}
"""
RECIPES = {
    "first": "",
    "second": "init: {path: 'out/first/seed{seed}'}\nphases: {heads: {run: {steps: 8}}, joint: {}}",
    "wreck": "run: {steps: 4}\nlogging: {every_steps: 2}\ninit: {path: out/first/seed0}\n"
    "health: {drift: {every_steps: 2, stop_loss: 1e-6}}\noptimizer: {lr: 5.0}",
    "doomed": "run: {steps: 4}\ninit: {path: wrecks/wreck/seed0}",
    "well": "run: {steps: 4, validate_every_steps: 4}",
}
SWEEP = ("sweep", "second.yaml", "first.yaml", "--seeds", "0,1", "--out", "out")
MEMBERS = [f"{name}/seed{seed}" for name in ("first", "second") for seed in (0, 1)]
MEASURED = {"num_samples": 8, "last_tokens": 4}


def start(*arguments: str, cwd: Path) -> warm.WarmProcess:
    """Start the command line as the leader of a process group of its own."""
    return warm.start(
        *arguments, cwd=cwd, environment=os.environ | {"OMP_NUM_THREADS": "1"}, merged=True, warm_ranks=True
    )


def mtp(*arguments: str) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(app, arguments)


def steps_in(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in run.glob("checkpoints/step-*[0-9]"))


def until_saved(run: Path) -> None:
    """Return soon after a run has written its first checkpoint."""
    until = time.monotonic() + 120
    while not steps_in(run) and time.monotonic() < until:
        time.sleep(0.002)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Two recipes and two seeds: killed with its group, interrupted, asked to stop, and gone on with to the end."""
    here = tmp_path_factory.mktemp("sweep")
    (here / "shared.yaml").write_text(SHARED)
    for name, text in RECIPES.items():
        (here / f"{name}.yaml").write_text(f"extends: shared.yaml\nname: {name}\n{text}\n")
    ends = {}
    for run, signum in (
        ("first/seed0", signal.SIGKILL),
        ("first/seed1", signal.SIGINT),
        ("second/seed0/phases/2-joint", signal.SIGTERM),
    ):
        process = start(*SWEEP, cwd=here)
        until_saved(here / "out" / run)
        os.killpg(process.pid, signum)
        said = process.communicate()[0]
        time.sleep(0.5)  # a child is killed by the kernel, and lets go of the folder
        ends[signum] = (process.returncode, said, steps_in(here / "out" / run)[-1])
    process = start(*SWEEP, cwd=here)
    said = process.communicate()[0]
    ends[None] = (process.returncode, said, 24)
    return here, ends


@pytest.fixture(autouse=True)
def _in_its_folder(swept, monkeypatch):
    monkeypatch.chdir(swept[0])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_a_sweep_goes_on_after_a_kill_an_interrupt_and_a_stop(swept):
    here, ends = swept
    for signum, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 85)):
        found, said, step = ends[signum]
        assert found == code, said
        assert step < 24, said
        assert signum == signal.SIGKILL or "Stopped; the same command goes on from here" in said
    code, said, _ = ends[None]
    assert code == 0, said
    plan = [line.split(None, 2)[1:] for line in said.splitlines() if line[:4].strip() in ("1", "2", "3", "4")]
    assert [words[0] for words in plan[:4]] == MEMBERS
    assert [words[1].partition(",")[0] for words in plan[:4]] == ["finished", "finished", "stopped", "new"]
    assert "Run 1 of 4: first/seed0: finished" in said
    assert "Run 4 of 4: second/seed1: trained" in said
    attempts = {name: len(list((here / "out" / name).glob("logs/attempt_*"))) for name in MEMBERS}
    assert attempts == dict(zip(MEMBERS, (2, 2, 2, 1), strict=True))


def test_a_member_is_what_mtp_train_makes_of_the_recipe(swept):
    """The other way: one recipe after the other, which nobody disturbs."""
    here, _ = swept
    for name in ("first", "second"):
        own = here / "alone" / name
        start_from = ["init.path=alone/first"] if name == "second" else []
        loaded = load_recipe(f"{name}.yaml", ["run.seed=1", f"run.dir={own}", *start_from])
        assert train(loaded) == 0
        weights, expected = (dict(load_model(run)[1].named_parameters()) for run in (here / f"out/{name}/seed1", own))
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[key], expected[key]) for key in expected)
    assert figures(here / "out/first/seed1/metrics.csv") == figures(here / "alone/first/metrics.csv")


def test_a_second_call_trains_nothing_and_another_is_refused(swept):
    here, _ = swept
    before = {path: path.stat().st_mtime_ns for path in here.glob("out/**/*") if path.is_file()}
    again = mtp(*SWEEP)
    assert again.exit_code == 0, again.stderr
    assert again.stdout.count(": finished") == 4
    other = mtp(*SWEEP, "optimizer.lr=1e-4")
    assert other.exit_code == 4
    assert "first/seed0: optimizer.lr: " in other.stderr
    assert {"error:", "found", "hint"} <= set(other.stderr.split())
    assert {path: path.stat().st_mtime_ns for path in here.glob("out/**/*") if path.is_file()} == before
    tried = mtp("sweep", "first.yaml", "--out", "new", "--dry-run", "--vary", "optimizer.lr=1e-4,1e-3")
    assert [line.split() for line in tried.stdout.splitlines()] == [
        ["1", "first-optimizer.lr=1e-4/seed0", "new"],
        ["2", "first-optimizer.lr=1e-3/seed0", "new"],
    ]
    assert not (here / "new").exists()


def test_one_that_fails_is_told_and_the_others_are_trained(swept):
    here, _ = swept
    done = mtp("sweep", "wreck.yaml", "doomed.yaml", "well.yaml", "--out", "wrecks")
    assert done.exit_code == 5, done.stderr
    message = " ".join(done.stderr.rpartition("error: ")[2].split())
    assert message.startswith(
        "every run of a sweep must end well found 2 of 3 failed: wreck/seed0: exit code 5: the main"
    )
    assert "health.drift.stop_loss crossed at step 2" in done.stderr
    assert "doomed/seed0: not trained: it starts from wreck/seed0" in message
    assert not (here / "wrecks/doomed/seed0/logs").exists()
    assert steps_in(here / "wrecks/well/seed0") == [4]
    compared = mtp("report", "compare", "wrecks")
    assert compared.exit_code == 0, compared.stderr
    assert "not finished, and left out: wrecks/wreck/seed0, wrecks/doomed/seed0" in compared.stderr


def test_what_its_runs_have_reached_is_measured_and_compared_in_two_commands(swept):
    here, _ = swept
    options = ("--samples", "8", "--last", "4", "--device", "cpu")
    done = mtp("eval", "marginal", "out", *options, "--json", "marginal.json")
    assert done.exit_code == 0, done.stderr
    reports = json.loads((here / "marginal.json").read_text())
    own = [json.loads(json.dumps(measure_marginal(here / "out" / name, **MEASURED).as_json())) for name in MEMBERS]
    assert reports == own
    kept = {name: (here / "out" / name / "marginal.json").stat().st_mtime_ns for name in MEMBERS}
    again = mtp("eval", "marginal", "out", *options).stdout
    assert done.stdout == f"{again}Figures written to marginal.json\n"
    assert {name: (here / "out" / name / "marginal.json").stat().st_mtime_ns for name in MEMBERS} == kept
    done = mtp("report", "compare", "out", "--json", "compared.json", "--plot", "compared.png")
    assert done.exit_code == 0, done.stderr
    first, second = json.loads((here / "compared.json").read_text())
    assert (first["recipe"], second["recipe"], second["seeds"]) == ("first", "second/joint", [0, 1])
    for group, ours in ((first, own[:2]), (second, own[2:])):
        seen = [
            spread([report["offsets"][offset][key] for report in ours])
            for offset, key in ((0, "head_top"), (1, "head_top"), (1, "marginal_top"))
        ]
        names = ("head_top_1", "head_top_2", "marginal_top_2")
        assert [group["figures"][name] for name in names] == [one._asdict() for one in seen]
        (line,) = [line for line in done.stdout.splitlines()[4:] if line.split()[:1] == [group["recipe"]]]
        assert line.split()[1:] == " ".join(f"{one.mean:.3f} ±{one.margin:.3f}" for one in seen).split()
    assert (here / "compared.png").stat().st_size > 10_000


def test_reports_that_do_not_answer_the_same_are_not_compared(swept):
    here, _ = swept
    runs = ("out/first/seed0", "out/first/seed1")
    for run, top in zip(runs, ("5", "9"), strict=True):
        done = mtp("eval", "marginal", run, "--samples", "4", "--last", "4", "--top", top)
        assert done.exit_code == 0, done.stderr
    done = mtp("report", "compare", *runs)
    assert done.exit_code == 4
    assert "first, seed 0 than for first, seed 1" in done.stderr
    path = here / runs[0] / "marginal.json"
    content = path.read_text()
    for broken, words in (
        (content.replace('"manifest_sha256": "', '"manifest_sha256": "0'), "must be of the run's last checkpoint"),
        (content.replace('"top": 5', '"top": "five"'), "must be what `mtp eval marginal` wrote"),
        (content[:99], "must be what `mtp eval marginal` wrote"),
    ):
        path.write_text(broken)
        done = mtp("report", "compare", runs[0])
        assert done.exit_code == 4
        assert words in " ".join(done.stderr.split())
    path.unlink()


def test_at_a_site_what_is_left_goes_into_one_array(swept, monkeypatch):
    here, _ = swept
    arguments = pretend_sbatch(here, monkeypatch, "echo 18")
    at_site = ("sweep", "well.yaml", "first.yaml", "--out", "out", "--seeds", "0,1", "--site", "local")
    tried = mtp(*at_site, "--dry-run", "site.time=00:03:00")
    assert tried.exit_code == 0, tried.stderr
    assert "#SBATCH --job-name=out\n" in tried.stdout
    unnamed = mtp("sweep", "well.yaml", "--seeds", "2", "--site", "local", "--dry-run")
    assert "#SBATCH --job-name=well\n" in unnamed.stdout
    assert "#SBATCH --array=0-1\n" in unnamed.stdout
    several = mtp("sweep", "well.yaml", "first.yaml", "--dry-run")
    assert several.exit_code
    assert "Give --out FOLDER" in several.stderr
    assert "#SBATCH --time=00:03:00\n" in tried.stdout
    assert not (here / "out/well").exists()
    done = mtp(*at_site)
    assert done.exit_code == 0, done.stderr
    assert "#SBATCH --array=0-1\n" in done.stdout
    assert arguments.read_text() == f"--parsable {here}/out/logs/submit_1/job.sh\n"
    for index in (0, 1):
        run = here / f"out/well/seed{index}"
        assert json.loads((run / "logs/job.json").read_text())["job"] == f"18_{index}"
        frozen = load_recipe(here / f"out/logs/submit_1/recipe_{index}.yaml").recipe
        assert frozen == load_recipe(run / "recipe.yaml").recipe
        assert (frozen.run.seed, frozen.run.dir) == (index, str(run))
    (here / "bin/squeue").write_text("#!/bin/sh\necho 18_0 PENDING\necho 18_1 FAILED\n")
    (here / "bin/squeue").chmod(0o755)
    again = mtp(*at_site, "--dry-run")
    assert "well/seed0   PENDING" in again.stderr
    assert "well/seed1   FAILED" in again.stderr
    assert "--array" not in again.stdout


def test_what_only_slurm_can_do_is_refused_without_it(swept):
    here, _ = swept
    for option in ("--after=3", "--then=bench decode", "--preflight", "--force", "--test-only"):
        done = mtp("sweep", "first.yaml", "--out", "new", option)
        assert done.exit_code == 6
        assert f"{option.partition('=')[0]} must be left out without --site" in done.stderr
    (here / "chained.yaml").write_text("extends: shared.yaml\nname: chained\ninit: {path: new/first/seed0}\n")
    done = mtp("sweep", "first.yaml", "chained.yaml", "--out", "new", "--site", "local")
    assert done.exit_code == 6
    assert "chained/seed0 from first/seed0" in done.stderr
    assert not (here / "new").exists()


def test_two_sweeps_at_once_share_the_runs(swept):
    """Which of them trains a run is chance; neither calls it a failure that the other was first."""
    here, _ = swept
    (here / "both.yaml").write_text("extends: shared.yaml\nname: both\n")
    command = ("sweep", "both.yaml", "--seeds", "0,1", "--out", "twice")
    sweeps = [start(*command, cwd=here) for _ in range(2)]
    said = [sweep.communicate()[0] for sweep in sweeps]
    assert [sweep.returncode for sweep in sweeps] == [0, 0], said
    assert any(": running" in text or ": finished" in text for text in said)
    assert steps_in(here / "twice/both/seed0")[-1] == steps_in(here / "twice/both/seed1")[-1] == 24
