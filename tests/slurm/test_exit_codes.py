"""What a job does when its ranks end, in a real Slurm: a stand-in for `mtp` ends as it is told to."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, output_of
from tests.support.runs import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm"), pytest.mark.timeout(200)]
RECIPE = str(ROOT / "recipes/debug/parallel.yaml")


class StandIn:
    """A program in place of `mtp`: a line of bash for each start, the last one for all further ones."""

    def __init__(self, folder: Path, *lines: str) -> None:
        self.folder = folder
        cases = "".join(f"{k}) {line} ;;\n" for k, line in enumerate(lines[:-1]))
        (folder / "mtp").write_text(
            f"#!/bin/bash\nrun={folder}/run\necho start on $SLURMD_NODENAME\n"
            f"case ${{SLURM_RESTART_COUNT:-0}} in\n{cases}*) {lines[-1]} ;;\nesac\n"
        )
        (folder / "mtp").chmod(0o755)

    @property
    def arguments(self) -> tuple[str, ...]:
        return (RECIPE, f"run.dir={self.folder}/run", f"site.mtp=[{self.folder}/mtp]")

    @property
    def of_a_sweep(self) -> tuple[str, ...]:
        return (RECIPE, f"--out={self.folder}/run", "--seeds=1,2", f"site.mtp=[{self.folder}/mtp]")

    @property
    def output(self) -> str:
        return output_of(self.folder / "run")


def nodes_of(stand_in: StandIn) -> list[str]:
    """Return the nodes that the stand-in has started on."""
    return [line.split()[-1] for line in stand_in.output.splitlines() if line.startswith("start on")]


SAVE = "mkdir -p $run/checkpoints/step-0000000$((SLURM_RESTART_COUNT + 1))"


@pytest.mark.parametrize("code", [87, 88, 3, 4])
def test_faults_that_stay_are_not_started_again(cluster: Cluster, tmp_path: Path, code: int) -> None:
    stand_in = StandIn(tmp_path, f"exit {code}")
    job = cluster.submit(*stand_in.arguments)
    cluster.until_state(job, "FAILED")
    assert cluster.job(job)["ExitCode"] == f"{code}:0"
    assert "not started again" in stand_in.output
    assert stand_in.output.count("start on") == 1


@pytest.mark.parametrize("code", [85, 89, 1, 137])
def test_what_may_pass_is_requeued(cluster: Cluster, tmp_path: Path, code: int) -> None:
    stand_in = StandIn(tmp_path, f"{SAVE}; exit {code}", "exit 0")
    job = cluster.submit(*stand_in.arguments)
    cluster.until_state(job, "COMPLETED")
    assert stand_in.output.count("start on") == 2
    assert cluster.job(job)["Restarts"] == "1"


def test_commands_run_when_the_training_has_ended_well_and_not_before(cluster: Cluster, tmp_path: Path) -> None:
    """A restart lies between; the second of two commands runs though the first has failed."""
    follow = 'echo "$@"; [[ $1 != bench ]]'
    stand_in = StandIn(tmp_path, f"if [[ $1 == train ]]; then {SAVE}; exit 85; else {follow}; fi", "exit 0")
    commands = ("--then", "bench decode", "--then", "export {run} --out '{run}/my export'")
    job = cluster.submit(*stand_in.arguments, *commands)
    after = str(int(job) + 1)
    cluster.until(lambda: "requeued" in stand_in.output)
    assert cluster.state(after) == "PENDING"
    cluster.until_state(job, "COMPLETED")
    cluster.until_state(after, "FAILED")
    run = tmp_path / "run"
    assert stand_in.output.count("start on") == 4
    assert f"\nbench decode {run}\n" in stand_in.output
    assert f"\nexport {run} --out {run}/my export\n" in stand_in.output
    assert cluster.job(after)["ExitCode"] == "1:0"


def test_nothing_comes_after_a_training_that_fails(cluster: Cluster, tmp_path: Path) -> None:
    stand_in = StandIn(tmp_path, "exit 88")
    job = cluster.submit(*stand_in.arguments, "--then", "bench decode")
    cluster.until_state(job, "FAILED")
    cluster.until_state(str(int(job) + 1), "CANCELLED")
    assert stand_in.output.count("start on") == 1


def test_a_preflight_that_fails_spends_nothing(cluster: Cluster, tmp_path: Path) -> None:
    stand_in = StandIn(tmp_path, "[[ $1 == train ]]")
    job = cluster.submit(*stand_in.arguments, "--preflight")
    cluster.until_state(job, "FAILED")
    assert stand_in.output.count("start on") == 1
    assert "preflight has found faults" in stand_in.output


def test_restarts_that_bring_no_checkpoint_are_limited(cluster: Cluster, tmp_path: Path) -> None:
    stand_in = StandIn(tmp_path, f"{SAVE}; exit 85", "exit 85")
    job = cluster.submit(*stand_in.arguments, "site.max_restarts=1")
    cluster.until_state(job, "FAILED")
    assert "without a checkpoint after step-00000001: 1, no more" in stand_in.output
    assert stand_in.output.count("start on") == 3  # with a checkpoint, from it, and once more


def test_a_bad_node_is_left_out(cluster: Cluster, tmp_path: Path) -> None:
    bad = "mkdir -p $run/logs; echo $SLURMD_NODENAME >>$run/logs/bad_nodes; exit 86"
    stand_in = StandIn(tmp_path, bad, "exit 0")
    job = cluster.submit(*stand_in.arguments)
    cluster.until_state(job, "COMPLETED")
    nodes = nodes_of(stand_in)
    assert sorted(nodes) == ["n1", "n2"], stand_in.output
    assert cluster.job(job)["ExcNodeList"] == nodes[0]


def test_a_bad_node_that_slurm_gives_again_is_given_back(cluster: Cluster, tmp_path: Path) -> None:
    stand_in = StandIn(tmp_path, f"{SAVE}; exit 85", "exit 0")
    job = cluster.submit(*stand_in.arguments)
    cluster.until(lambda: "requeued" in stand_in.output)
    cluster.until_state(job, "PENDING")
    first, *_ = nodes_of(stand_in)
    (tmp_path / "run/logs/bad_nodes").write_text(f"{first}\n")  # too late to be excluded before the restart
    cluster.until_state(job, "COMPLETED")
    assert sorted(nodes_of(stand_in)) == ["n1", "n2"], stand_in.output
    assert "given a bad node again; requeued" in stand_in.output


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    stand_in = StandIn(tmp_path, f"trap 'exit 85' TERM; touch {ready}; while :; do sleep 0.1; done")
    job = cluster.submit(*stand_in.arguments)
    cluster.until(ready.exists)  # a task that has just begun does not heed signals yet
    cluster.run("scancel", job)
    cluster.until(lambda: "ended by Slurm" in stand_in.output)
    cluster.until_state(job, "CANCELLED")
    assert "requeued" not in stand_in.output


def test_tasks_of_an_array_are_requeued_one_by_one(cluster: Cluster, tmp_path: Path) -> None:
    stand_in = StandIn(tmp_path, f"[[ $SLURM_ARRAY_TASK_ID == 0 ]] || {{ {SAVE}; exit 85; }}", "exit 0")
    job = cluster.submit(*stand_in.of_a_sweep, verb="sweep")
    for task in (0, 1):
        cluster.until_state(f"{job}_{task}", "COMPLETED")
    assert [cluster.job(f"{job}_{task}")["Restarts"] for task in (0, 1)] == ["0", "1"]
    assert stand_in.output.count("start on") == 3


@pytest.mark.timeout(300)
def test_time_limits_are_survived_with_the_signal_and_without(cluster: Cluster, tmp_path: Path) -> None:
    """The first task of an array heeds the signal before the limit, the second is killed at the limit."""
    heed = "[[ $SLURM_ARRAY_TASK_ID == 0 ]] && trap 'exit 85' USR1 || trap '' USR1"
    stand_in = StandIn(tmp_path, f"{heed}; while :; do sleep 0.1; done", "exit 0")
    limit = ("site.time=00:01:00", "site.signal_lead_s=20")
    job = cluster.submit(*stand_in.of_a_sweep, *limit, verb="sweep")
    for task in (0, 1):
        cluster.until_state(f"{job}_{task}", "COMPLETED", timeout_s=250)
        assert cluster.job(f"{job}_{task}")["Restarts"] == "1"
    assert stand_in.output.count("stopped, to go on from its last checkpoint; requeued") == 1
    assert "DUE TO TIME LIMIT" in stand_in.output


def test_a_dead_rank_does_not_hold_the_others(cluster: Cluster, tmp_path: Path) -> None:
    stand_in = StandIn(tmp_path, "if [[ $SLURM_PROCID == 0 ]]; then exit 1; fi; sleep 100", "exit 0")
    ranks = ("strategy.kind=zero1", "strategy.num_nodes=2", "strategy.ranks_per_node=1")
    job = cluster.submit(*stand_in.arguments, *ranks, "site.wait_s=3", "data.document_mask=false")
    cluster.until_state(job, "COMPLETED", timeout_s=40)
    assert stand_in.output.count("start on") == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("site.partition=nowhere",), "invalid partition"),
        (
            ("strategy.kind=zero1", "strategy.num_nodes=4", "batch.micro_batch_size=1"),
            "node configuration is not available",
        ),
    ],
)
def test_what_slurm_would_refuse_is_known_before(
    cluster: Cluster, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    command = [sys.executable, "-m", "mtp_lightning", "submit", RECIPE, "--site", "local", "--test-only"]
    done = subprocess.run(
        [*command, f"run.dir={tmp_path}/run", *arguments],
        env=cluster.environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 6
    assert words in " ".join(done.stderr.split()).lower()
    assert not (tmp_path / "run").exists()
