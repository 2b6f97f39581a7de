"""Law 9 for signals: sent away by SIGUSR1, SIGTERM or SIGHUP at any moment, code 85, then as if never sent away."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest

from mtp_lightning.checkpoint.format.folder import complete_checkpoints
from mtp_lightning.launch.signals import REQUEUE, STOP_SIGNALS, StopRequest, stop_on_signals
from tests.launch.signalled import after_step, child_signalled, group_signalled, has_begun, saves, signalled, start
from tests.support.runs import ROOT, figures, mtp

STEPS, FEWER = 60, 30  # on one rank, and on two, which take longer
SHORT = ("checkpoint.every_steps=1000", "run.validate_every_steps=20", "logging.every_steps=3")
# A figure over several steps and ranks is a sum in fp32, whose order a resume within these steps changes.
TWO_RANKS = ("strategy.kind=zero2", "strategy.ranks_per_node=2", "logging.every_steps=1", f"run.steps={FEWER}")
STOPPED = """
import signal
from mtp_lightning.launch.signals import StopRequest, stop_on_signals
with stop_on_signals(StopRequest()) as stop:
    stop.defer()
    signal.raise_signal(signal.SIGTERM)
raise SystemExit(stop.exit_code)
"""


def train(cwd, name, *extra):
    recipe = str(ROOT / "recipes/debug/parallel.yaml")
    return ("train", recipe, f"run.steps={STEPS}", *SHORT, f"run.dir={name}", f"run.cache={cwd}/cache", *extra)


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(cwd):
    assert mtp(*train(cwd, "whole"), cwd=cwd).returncode == 0
    return cwd / "whole"


def digests(run, steps):
    manifest = complete_checkpoints(run / "checkpoints")[-1].manifest
    assert manifest.step == steps
    return {name: record.sha256 for name, record in manifest.files.items() if name.endswith(".safetensors")}


def assert_goes_on_as(whole, run, *extra):
    """The same command ends the run as if it had never been stopped."""
    done = mtp(*train(run.parent, run.name, *extra), cwd=run.parent)
    assert done.returncode == 0, done.stderr
    assert figures(run / "metrics.csv") == figures(whole / "metrics.csv")
    steps = FEWER if extra == TWO_RANKS else STEPS
    assert digests(run, steps) == digests(whole, steps)


@pytest.mark.parametrize(
    ("name", "signals"),
    [
        ("usr1", [signal.SIGUSR1]),
        pytest.param("term_and_again", [signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1], marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_after_the_step_and_the_run_goes_on(cwd, whole, name, signals):
    process = start(*train(cwd, name), cwd=cwd)
    code, output = signalled(process, cwd / name, after_step(6), *signals)
    assert code == REQUEUE, output
    [stopped] = complete_checkpoints(cwd / name / "checkpoints")
    assert 6 <= stopped.step < STEPS
    assert output.count("with a checkpoint and exit code 85") == 1
    assert_goes_on_as(whole, cwd / name)


@pytest.mark.slow
def test_a_closed_terminal_stops_after_the_step(cwd):
    """As a window is closed or a connection lost: SIGHUP comes, and neither stdout nor stderr take anything more."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mtp_lightning", *train(cwd, "terminal")],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    os.set_blocking(master, False)
    while process.poll() is None and not after_step(6)(cwd / "terminal"):
        drain(master)
        time.sleep(0.005)
    os.close(master)
    assert process.wait(100) == REQUEUE
    [stopped] = complete_checkpoints(cwd / "terminal/checkpoints")
    assert 6 <= stopped.step < STEPS


def drain(master):
    with contextlib.suppress(BlockingIOError):
        os.read(master, 65536)


@pytest.mark.slow
@pytest.mark.parametrize("extra", [(), TWO_RANKS], ids=["alone", "two_ranks"])
def test_a_run_under_nohup_goes_on(cwd, extra):
    run = cwd / f"nohup_{len(extra)}"
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which the run inherits, as it does from nohup
    try:
        process = start(*train(cwd, run.name, *extra), cwd=cwd, warm_ranks=True)
    finally:
        signal.signal(signal.SIGHUP, former)
    code, output = signalled(process, run, after_step(6), signal.SIGHUP)
    assert code == 0, output
    assert complete_checkpoints(run / "checkpoints")[-1].step == (FEWER if extra else STEPS)


@pytest.mark.slow
def test_a_hangup_stops_two_ranks(cwd):
    process = start(*train(cwd, "hangup_2", *TWO_RANKS), cwd=cwd, warm_ranks=True)
    code, output = signalled(process, cwd / "hangup_2", after_step(6), signal.SIGHUP)
    assert code == REQUEUE, output
    [stopped] = complete_checkpoints(cwd / "hangup_2/checkpoints")
    assert 6 <= stopped.step < FEWER


def test_before_the_first_step_there_is_nothing_to_save(cwd):
    code, output = signalled(start(*train(cwd, "early"), cwd=cwd), cwd / "early", has_begun, signal.SIGTERM)
    assert code == REQUEUE, output
    assert complete_checkpoints(cwd / "early/checkpoints") == []


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP], ids=["SIGTERM", "SIGHUP"])
def test_loader_workers_leave_the_signal_to_the_run(cwd, whole, signum):
    run = cwd / f"workers{signum}"
    process = start(*train(cwd, run.name, "data.workers=1"), cwd=cwd)
    code, output = group_signalled(process, run, after_step(6), signum)
    assert code == REQUEUE, output
    assert_goes_on_as(whole, run)


@pytest.mark.slow
def test_killed_in_the_save_that_the_signal_asked_for(cwd, whole):
    """SIGTERM without time: what was saved before is what the run goes on from."""
    extra = ("checkpoint.every_steps=5",)
    process = start(*train(cwd, "cut", *extra), cwd=cwd)
    code, output = signalled(process, cwd / "cut", after_step(9), signal.SIGTERM, signal.SIGKILL)
    assert code == -9, output
    assert_goes_on_as(whole, cwd / "cut", *extra)


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.matrix if seed % 2 else pytest.mark.slow) for seed in range(6)]
)
def test_signals_during_saves_and_validations(cwd, whole, seed):
    """A save every step and a validation every second: the signal falls into one or the other."""
    name, extra = f"busy_{seed}", ("checkpoint.every_steps=1", "checkpoint.in_background=true")
    process = start(*train(cwd, name, *extra), cwd=cwd)
    code, output = signalled(process, cwd / name, saves(18 + seed), signal.SIGUSR1, signal.SIGTERM)
    assert code == REQUEUE, output
    assert_goes_on_as(whole, cwd / name, *extra)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_ranks_stop_at_the_same_step_whoever_was_asked(cwd):
    assert mtp(*train(cwd, "whole_2", *TWO_RANKS), cwd=cwd).returncode == 0
    process = start(*train(cwd, "ranks", *TWO_RANKS), cwd=cwd)
    code, output = child_signalled(process, cwd / "ranks", after_step(6), signal.SIGUSR1)
    assert code == REQUEUE, output
    assert len(complete_checkpoints(cwd / "ranks/checkpoints")) == 1
    assert_goes_on_as(cwd / "whole_2", cwd / "ranks", *TWO_RANKS)


def test_signals_are_remembered_once_there_is_something_to_save(capfd):
    stop = StopRequest()
    before = [signal.getsignal(signum) for signum in STOP_SIGNALS]
    with stop_on_signals(stop):
        stop.defer()
        for signum in STOP_SIGNALS:
            signal.raise_signal(signum)
    assert stop.exit_code == REQUEUE
    assert [signal.getsignal(signum) for signum in STOP_SIGNALS] == before
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_signals_end_a_process_that_has_nothing_to_save():
    with stop_on_signals(StopRequest()), pytest.raises(SystemExit, match="85"):
        signal.raise_signal(signal.SIGTERM)


def test_signals_that_are_ignored_stay_ignored():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals(StopRequest()) as stop:
            signal.raise_signal(signal.SIGHUP)  # would end it
        assert stop.exit_code == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


@pytest.mark.parametrize("where", ["2>&-", "2>/dev/full"])
def test_a_stop_that_cannot_be_told_is_a_stop_all_the_same(where):
    done = subprocess.run(["bash", "-c", f'"$0" -c "$1" {where}', sys.executable, STOPPED], cwd=ROOT, check=False)
    assert done.returncode == REQUEUE


def test_threads_leave_signals_alone():
    before = signal.getsignal(signal.SIGTERM)

    def run():
        with stop_on_signals(StopRequest()):
            found.append(signal.getsignal(signal.SIGTERM))

    found: list[object] = []
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [before]
