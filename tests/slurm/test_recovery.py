"""The shrunken 13B recipe on 2 nodes x 2 ranks of a real Slurm: all that can happen to it ends in the same weights."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mtp_lightning.checkpoint.format.folder import complete_checkpoints
from tests.slurm.cluster import Cluster, attempts_of, output_of
from tests.support import warm
from tests.support.runs import ROOT, figures

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(1200)]
STEPS = 24
RECIPE = (
    str(ROOT / "recipes/paper/13b_n4.yaml"),
    "debug.shrink=true",
    "strategy.num_nodes=2",
    "strategy.ranks_per_node=2",
    f"run.steps={STEPS}",
    "run.validate_every_steps=12",
)


def submit(cluster: Cluster, folder: Path, name: str, *more: str) -> str:
    return cluster.submit(*RECIPE, f"run.dir={folder}/{name}", f"run.cache={folder}/cache", *more)


def digests(run: Path) -> dict[str, str]:
    """Weights and moments of every rank at the end."""
    manifest = complete_checkpoints(run / "checkpoints")[-1].manifest
    assert manifest.step == STEPS
    found = {name: record.sha256 for name, record in manifest.files.items() if name.endswith(".safetensors")}
    assert sum(name.startswith("model-") for name in found) == 4
    return found


def has_done(run: Path, start: int, num_steps: int) -> Callable[[], bool]:
    """Say when a start of a run, the first being 0, has logged so many steps."""

    def is_so() -> bool:
        _, found, own = output_of(run).partition(f": start {start} on ")
        return bool(found) and own.count("\nstep ") >= num_steps

    return is_so


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recovery")


@pytest.fixture(scope="module")
def whole(cluster: Cluster, folder: Path) -> Path:
    job = submit(cluster, folder, "whole")
    cluster.until_state(job, "COMPLETED", "FAILED")
    assert "finished" in output_of(folder / "whole"), output_of(folder / "whole")
    return folder / "whole"


def test_a_sweep_is_an_array_of_the_runs_that_would_be_submitted_alone(
    cluster: Cluster, folder: Path, whole: Path
) -> None:
    sweep = (*RECIPE, f"run.cache={folder}/cache", "--seeds=0,1", f"--out={folder}/sweep")
    job = cluster.submit(*sweep, verb="sweep")
    for task in (0, 1):
        cluster.until_state(f"{job}_{task}", "COMPLETED", "FAILED")
    runs = [folder / f"sweep/paper-13b-n4/seed{seed}" for seed in (0, 1)]
    assert digests(runs[0]) == digests(whole)
    assert digests(runs[1]) != digests(whole)
    again = cluster.run(sys.executable, "-m", "mtp_lightning", "sweep", *sweep, "--site=local")
    assert again.count("  finished") == 2
    assert "SBATCH" not in again


def test_whatever_happens_the_weights_are_those_of_an_uninterrupted_run(
    cluster: Cluster, folder: Path, whole: Path
) -> None:
    run = folder / "troubled"
    job = submit(cluster, folder, "troubled", "checkpoint.every_steps=5")

    cluster.until(has_done(run, 0, 4))  # a job of higher priority takes the nodes away
    cluster.run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    cluster.until(lambda: attempts_of(run) == 2)
    assert output_of(run).count("SIGTERM: stopping after this step") == 4
    preempted_at = complete_checkpoints(run / "checkpoints")[-1].step
    assert 4 <= preempted_at < STEPS

    cluster.until(has_done(run, 1, 7))  # power cut
    cluster.kill_node("n2")
    cluster.until(lambda: cluster.state(job) == "PENDING")
    cluster.revive_node("n2")
    cluster.until(lambda: attempts_of(run) == 3)
    killed_at = complete_checkpoints(run / "checkpoints")[-1].step
    assert killed_at >= preempted_at

    cluster.until(has_done(run, 2, 2))  # what Slurm sends before the time limit
    cluster.run("scancel", "--signal=USR1", job)
    cluster.until_state(job, "COMPLETED", "FAILED")
    assert output_of(run).count("SIGUSR1: stopping after this step") == 4
    assert int(cluster.job(job)["Restarts"]) == 3
    assert attempts_of(run) == 4
    assert output_of(run).count("Continuing ") == 3

    assert digests(run) == digests(whole)
    assert figures(run / "metrics.csv") == figures(whole / "metrics.csv")


@pytest.mark.timeout(1500)
def test_time_limits_are_survived(cluster: Cluster, folder: Path, whole: Path) -> None:
    """Two minutes are not enough for twenty-four steps of more than five seconds.

    One would be Slurm's least, but its signal may come a minute early, and then no start came as far as a step.
    """
    slow = f"site.mtp=[{warm.server().python}, -m, tests.support.slow_mtp]"
    limit = ("site.time=00:02:00", "site.signal_lead_s=20")
    job = submit(cluster, folder, "limited", slow, *limit)
    cluster.until_state(job, "COMPLETED", "FAILED", timeout_s=1200)
    output, restarts = output_of(folder / "limited"), int(cluster.job(job)["Restarts"])
    assert restarts >= 1, output
    assert output.count("SIGUSR1") >= 4, output
    assert "Continuing " in output
    assert digests(folder / "limited") == digests(whole)
    assert figures(folder / "limited/metrics.csv") == figures(whole / "metrics.csv")


def test_other_steps_have_other_weights(whole: Path) -> None:
    """The comparison above can fail."""
    before, last = complete_checkpoints(whole / "checkpoints")[-2:]
    shared = [name for name in last.manifest.files if name.startswith("model-")]
    assert len(shared) == 4
    assert not [name for name in shared if before.manifest.files[name].sha256 == last.manifest.files[name].sha256]
