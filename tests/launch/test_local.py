"""Ranks of one machine: started together, stopped together, heard as one; real processes of the real command line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtp_lightning.checkpoint.format.folder import complete_checkpoints
from mtp_lightning.errors import LaunchError
from mtp_lightning.launch.local import needs_ranks
from mtp_lightning.launch.rank_env import local_rank_info
from mtp_lightning.recipe.schema.root import Recipe
from tests.support.covering import some_of
from tests.support.runs import ROOT

LAUNCHER = """
import sys
from mtp_lightning.launch import local
from mtp_lightning.recipe.schema.root import Recipe
local.GRACE_S = float(sys.argv[1])
recipe = Recipe.model_validate({"strategy": {"kind": "zero1", "ranks_per_node": int(sys.argv[2])}})
sys.exit(local.run_ranks(recipe, sys.argv[3:]))
"""
RANK = """
import os, signal, sys, time
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path(os.environ["SEEN"])
(folder / f"pid{rank}").write_text(str(os.getpid()))
def hear(signum, frame):
    with (folder / f"signals{rank}").open("a") as file:
        file.write(signal.Signals(signum).name + chr(10))
    if os.environ.get("ENDS_ON_SIGNAL"):
        sys.exit(130)
for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(signum, hear)
(folder / f"ready{rank}").touch()
"""


@pytest.fixture
def launch(tmp_path):
    """Start a launcher whose ranks run the given code: a package of their own takes the place of the command line."""
    started = []

    def start(code, *, num_ranks=2, grace_s=0.3, **environment):
        package = tmp_path / "mtp_lightning_of_ranks" / "mtp_lightning"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(RANK + code)
        # -P keeps the working folder off the launcher's path; its ranks find the package above in theirs.
        launcher = f"import sys; sys.path.insert(0, {str(ROOT)!r})" + LAUNCHER
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", launcher, str(grace_s), str(num_ranks)],
            cwd=package.parent,
            env=os.environ | {"SEEN": str(tmp_path)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ended(process, within_s=20):
    out, err = process.communicate(timeout=within_s)
    return process.returncode, out, err


def wait_for(*paths, within_s=20):
    until = time.monotonic() + within_s
    while not all(path.exists() for path in paths):
        assert time.monotonic() < until, paths
        time.sleep(0.01)


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_ranks_that_end_well(launch):
    code, out, err = ended(launch('print("rank", rank, "of", os.environ["WORLD_SIZE"])', num_ranks=3))
    assert (code, err) == (0, "")
    assert out == "rank 0 of 3\n"  # the others are not heard


@pytest.mark.parametrize("failing", [0, 1])
def test_the_exit_code_is_that_of_the_rank_that_failed(launch, failing):
    code, _, err = ended(launch(f'print("says", rank, file=sys.stderr); sys.exit(7 if rank == {failing} else 0)'))
    assert code == 7
    assert ("Rank 1 of 2 ended with exit code 7:\nsays 1\n" in err) == (failing == 1)


def test_a_rank_that_fails_stops_the_others(launch, tmp_path):
    began_at = time.monotonic()
    process = launch("""
if rank == 1:
    print("no GPU here"); sys.exit(3)
time.sleep(60)
""")
    code, _, err = ended(process)
    assert code == 3
    assert "Rank 1 of 2 ended with exit code 3:\nno GPU here\n" in err
    assert time.monotonic() - began_at < 15
    assert not is_alive((tmp_path / "pid0").read_text())
    assert (tmp_path / "signals0").read_text().split() == ["SIGTERM"]  # asked once, then made to


def test_the_same_failure_is_shown_once(launch):
    says = 'time.sleep(0.2 * (rank == 0)); print("bad recipe", file=sys.stderr); sys.exit(2)'
    code, _, err = ended(launch(says, grace_s=5))
    assert code == 2
    assert err == "bad recipe\n"


def test_a_killed_rank_gives_the_code_that_a_shell_gives(launch):
    code, _, _ = ended(launch("os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else None"))
    assert code == 128 + signal.SIGKILL


def test_a_long_message_is_cut_to_its_end(launch):
    code, _, err = ended(launch('rank and print("x" * 50_000 + "the end"); sys.exit(rank)'))
    assert code == 1
    assert err.endswith("the end\n")
    assert len(err) < 9_000


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


@pytest.mark.parametrize("signum", some_of(SIGNALS, one_in=2))
def test_a_signal_reaches_every_rank_once(launch, tmp_path, signum):
    process = launch("""
until = time.monotonic() + 60
while time.monotonic() < until:
    if (folder / f"signals{rank}").exists():
        until = min(until, time.monotonic() + 0.5)  # time for a second one
    time.sleep(0.01)
sys.exit(130)
""")
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    process.send_signal(signum)
    code, _, _ = ended(process)
    assert code == 130
    for rank in (0, 1):
        assert (tmp_path / f"signals{rank}").read_text().split() == [signum.name]


def test_a_launcher_under_nohup_passes_no_hangup_on(launch, tmp_path):
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which the launcher inherits, as it does from nohup
    try:
        process = launch("time.sleep(1)")
    finally:
        signal.signal(signal.SIGHUP, former)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    process.send_signal(signal.SIGHUP)
    assert ended(process)[0] == 0
    assert not list(tmp_path.glob("signals*"))


def test_ctrl_c_of_a_terminal_reaches_every_rank_once(launch, tmp_path):
    """A terminal interrupts all processes of its group; ranks are in groups of their own."""
    process = launch("time.sleep(60)", ENDS_ON_SIGNAL="1")
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    groups = {os.getpgid(int((tmp_path / f"pid{rank}").read_text())) for rank in (0, 1)}
    assert len(groups) == 2
    assert os.getpgid(process.pid) not in groups
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 130


def test_ranks_die_with_a_killed_launcher(launch, tmp_path):
    process = launch("time.sleep(60)")
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    pids = [(tmp_path / f"pid{rank}").read_text() for rank in (0, 1)]
    assert all(map(is_alive, pids))
    process.kill()
    process.wait()
    until = time.monotonic() + 5
    while any(map(is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(is_alive, pids))


def test_ranks_share_the_processors(launch):
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    process = launch('print(os.environ["OMP_NUM_THREADS"])', OMP_NUM_THREADS=str(threads + 3))
    assert ended(process)[1] == f"{threads + 3}\n"  # what the user has set stands


def recipe(**strategy):
    return Recipe.model_validate({"strategy": strategy})


def test_who_needs_ranks():
    assert not needs_ranks(recipe(), {})
    assert not needs_ranks(recipe(kind="zero3"), {})
    assert needs_ranks(recipe(kind="zero3", ranks_per_node=2), {})
    assert not needs_ranks(recipe(kind="zero3", ranks_per_node=2), local_rank_info(0, 2, 1).environment)


def test_ranks_of_several_nodes_are_not_started_here():
    with pytest.raises(LaunchError) as caught:
        needs_ranks(recipe(kind="zero3", ranks_per_node=8, num_nodes=16), {})
    assert "16 nodes" in caught.value.expected
    assert "srun --nodes=16 --ntasks-per-node=8" in caught.value.hint


@pytest.mark.slow
def test_ranks_go_on_when_nobody_reads_what_the_first_prints(tmp_path):
    """The first rank alone has a terminal or pipe, and somebody may close it."""
    own = [f"run.dir={tmp_path}/run", f"run.cache={tmp_path}/cache", "run.steps=40", "logging.every_steps=1"]
    ranks = ["strategy.kind=zero2", "strategy.ranks_per_node=2", "batch.micro_batch_size=2"]
    command = [sys.executable, "-m", "mtp_lightning", "train", "recipes/debug/parallel.yaml", *own, *ranks]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        assert run.stdout is not None
        while not run.stdout.readline().startswith(b"step"):
            assert run.poll() is None
        run.stdout.close()
        assert run.wait(120) == 0
    assert complete_checkpoints(tmp_path / "run/checkpoints")[-1].step == 40
