"""A node that is killed, and one that comes back: under `torchrun --nnodes=1:2` the run goes on in the same stream."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.distributed import HashStore

from mtp_lightning.errors import LaunchError
from mtp_lightning.launch.rank_env import free_port, local_rank_info, started_ranks
from mtp_lightning.recipe.loading.load import load_recipe
from mtp_lightning.training.strategies.process_group import _joined_by_all
from tests.laws.test_zero_resume import ELASTIC_TOLERANCE, assert_near, assert_nobody_stays, read_or_nothing
from tests.support.runs import ROOT, figures, last_step, mtp

STEPS, SHORT = 160, 40


def run_of(steps):
    """A run of so many steps, validated twice."""
    return (
        *("train", str(ROOT / "recipes/debug/sequential.yaml")),
        *(f"run.steps={steps}", f"run.validate_every_steps={steps // 2}", "checkpoint.every_steps=10"),
        *("logging.every_steps=1", "batch.micro_batch_size=2", "run.device=cpu", "run.threads=1", "run.cache=cache"),
    )


RUN = run_of(STEPS)
MEETING = "last_call_timeout=2,keep_alive_interval=2,keep_alive_max_attempt=5"  # a busy machine is not a dead one
PATIENCE_S = 240


def wait_until(condition, folder):
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, "".join(path.read_text()[-4000:] for path in folder.parent.glob("agent_*"))
        time.sleep(0.05)


@contextmanager
def agent(folder, port, *, is_host="true", num_nodes="1:2", num_ranks=1, run=()):
    """An agent of torchrun with its ranks, as on a node of its own; its output goes to a file."""
    launcher = (
        *("-m", "torch.distributed.run", f"--nnodes={num_nodes}"),
        *(f"--nproc-per-node={num_ranks}", "--max-restarts=3"),
    )
    meeting = ("--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=x")
    elastic = ("strategy.elastic=true", "strategy.kind=zero2", f"run.dir={folder}")
    with (folder.parent / f"agent_{is_host}.txt").open("ab") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, *launcher, *meeting, f"--rdzv-conf={MEETING},is_host={is_host}"),
                *("-m", "mtp_lightning", *(run or RUN), *elastic),
            ],
            cwd=folder.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
            stdout=log,
            stderr=log,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def ranks_of(folder):
    """Numbers of ranks of the run's attempts, as the run has told of their changes."""
    told = (folder.parent / "agent_true.txt").read_text()
    return [line for line in told.splitlines() if line.startswith("Changed since this run began")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_comes_and_is_lost(tmp_path):
    """One node, two, and one again; the first agent restarts its rank each time, from the newest checkpoint."""
    folder, port = tmp_path / "run", free_port()
    metrics = folder / "metrics.csv"
    with agent(folder, port, is_host="true") as first:
        wait_until(lambda: last_step(metrics) >= 4, folder)
        with agent(folder, port, is_host="false") as second:
            wait_until(lambda: len(ranks_of(folder)) == 1, folder)
            joined_at = last_step(metrics)
            assert (folder / f"checkpoints/step-{joined_at:08d}").is_dir(), "the ranks that make room commit first"
            wait_until(lambda: last_step(metrics) >= joined_at + 13, folder)
            second.send_signal(signal.SIGKILL)
            wait_until(lambda: len(ranks_of(folder)) == 2, folder)
        assert first.wait(PATIENCE_S) == 0, (tmp_path / "agent_true.txt").read_text()[-4000:]
    assert_nobody_stays(folder)
    assert [line.split("(")[0].rsplit(": ")[-1].strip() for line in ranks_of(folder)] == ["1 -> 2", "2 -> 1"]
    assert [row["step"] for row in figures(metrics) if row.get("train/loss_1")] == [str(n) for n in range(1, STEPS + 1)]
    whole = mtp(*RUN, "run.dir=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert_near(folder, tmp_path / "whole", ELASTIC_TOLERANCE)


def rank_of(agent_process, number):
    """Process id of a rank that an agent has started."""
    for status in Path("/proc").glob("[0-9]*/status"):
        parent = f"PPid:\t{agent_process.pid}\n".encode()
        is_child = parent in read_or_nothing(status)
        if is_child and f"\0RANK={number}\0".encode() in read_or_nothing(status.with_name("environ")):
            return int(status.parent.name)
    raise AssertionError(f"no rank {number} of the agent")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_rank_is_lost_and_the_same_number_goes_on(tmp_path):
    """One rank of two, then the other, which holds the lock: the end is that of an undisturbed run, to the bit."""
    folder, run = tmp_path / "run", run_of(SHORT)
    metrics = folder / "metrics.csv"

    def num_attempts():
        return len(list(folder.glob("logs/attempt_*")))

    with agent(folder, free_port(), num_nodes=1, num_ranks=2, run=run) as process:
        for victim, after_step in ((1, 12), (0, 24)):
            wait_until(lambda after_step=after_step: last_step(metrics) >= after_step, folder)
            before = num_attempts()
            os.kill(rank_of(process, victim), signal.SIGKILL)
            wait_until(lambda before=before: num_attempts() == before + 1, folder)
        assert process.wait(PATIENCE_S) == 0, (tmp_path / "agent_true.txt").read_text()[-4000:]
    assert_nobody_stays(folder)
    assert num_attempts() == 3
    told = re.findall(r"Continuing \S+ after step (\d+) of", (tmp_path / "agent_true.txt").read_text())
    assert len(told) == 2
    assert all(int(step) >= least for step, least in zip(told, (10, 20), strict=True))  # not from the beginning
    whole = mtp(*run, "run.dir=whole", "strategy.kind=zero2", "strategy.ranks_per_node=2", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert figures(metrics) == figures(tmp_path / "whole/metrics.csv")
    shards = sorted((folder / f"checkpoints/step-{SHORT:08d}").glob("*-of-*.safetensors"))
    assert len(shards) == 4
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "whole" / shard.relative_to(folder)).read_bytes(), shard.name


def joined(server, num_ranks, *, ranks):
    """Let ranks join at once; return their threads, and the stores they get by rank."""
    found = {}

    def join(rank):
        store = _joined_by_all(server, local_rank_info(rank, num_ranks, 29500))
        store.set(f"from {rank}", "")
        found[rank] = store

    threads = [threading.Thread(target=join, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    return threads, found


def assert_joined(threads, *parts, num_ranks):
    for thread in threads:
        thread.join(10)
    found = {rank: store for part in parts for rank, store in part.items()}
    assert sorted(found) == list(range(num_ranks))
    assert found[0].check([f"from {rank}" for rank in found]), "all are at the same meeting"


@pytest.mark.parametrize("sizes", [(2, 2), (2, 1, 2), (3, 2, 3), (1, 3, 3)])
def test_ranks_meet_anew_in_a_store_that_outlives_them(sizes):
    server = HashStore()
    for size in sizes:
        late, found = joined(server, size, ranks=range(1, size))
        time.sleep(0.15)
        assert not found, "the meeting before is not theirs"
        first, of_first = joined(server, size, ranks=[0])
        assert_joined([*late, *first], found, of_first, num_ranks=size)


def test_ranks_leave_a_meeting_that_was_given_up():
    """The first rank of a round is killed before all have come: the next one's meeting is another."""
    server = HashStore()
    server.set("mtp/meeting", "2 ranks/given up")
    others, found = joined(server, 2, ranks=[1])
    time.sleep(0.25)
    first, of_first = joined(server, 2, ranks=[0])
    assert_joined([*others, *first], found, of_first, num_ranks=2)


def test_an_elastic_recipe_takes_the_ranks_that_were_started():
    environment = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    changes = ["strategy.kind=zero2", "batch.global_batch_size=12", "batch.micro_batch_size=2"]
    recipe = load_recipe(ROOT / "recipes/debug/parallel.yaml", [*changes, *started_ranks(environment)]).recipe
    assert (recipe.strategy.num_nodes, recipe.strategy.ranks_per_node) == (3, 2)
    assert started_ranks({}) == []
    with pytest.raises(LaunchError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun"):
        started_ranks(environment | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
