"""Runs of `mtp train` that are sent signals."""

import os
import time
from collections.abc import Callable
from pathlib import Path

from tests.support import warm
from tests.support.runs import last_step

Moment = Callable[[Path], bool]


def start(*arguments: str, cwd: Path, warm_ranks: bool = False) -> warm.WarmProcess:
    """Start `mtp` in a process group of its own; with `warm_ranks` there is a process between it and each rank."""
    return warm.start(*arguments, cwd=cwd, merged=True, warm_ranks=warm_ranks)


def signalled(process: warm.WarmProcess, run: Path, moment: Moment, *signals: int) -> tuple[int, str]:
    """Send signals when the moment has come; return exit code and output."""
    while process.poll() is None and not moment(run):
        time.sleep(0.005)
    for signum in signals:
        process.send_signal(signum)
        time.sleep(0.01)
    output, _ = process.communicate(timeout=200)
    return process.wait(), output


def after_step(step: int) -> Moment:
    """The moment when a step has been logged."""
    return lambda run: last_step(run / "metrics.csv") >= step


def has_begun(run: Path) -> bool:
    """The moment when a run folder is there, long before the first step."""
    return (run / "logs").exists()


def saves(step: int) -> Moment:
    """The moment when a checkpoint is being written."""
    return lambda run: (run / f"checkpoints/step-{step:08d}.partial").exists()


def group_signalled(process: warm.WarmProcess, run: Path, moment: Moment, signum: int) -> tuple[int, str]:
    """As Slurm and terminals do: a signal to every process of the step, loader workers included."""
    while process.poll() is None and not moment(run):
        time.sleep(0.005)
    os.killpg(process.pid, signum)
    output, _ = process.communicate(timeout=200)
    return process.wait(), output


def child_signalled(process: warm.WarmProcess, run: Path, moment: Moment, signum: int) -> tuple[int, str]:
    """Send a signal to the last rank alone."""
    while process.poll() is None and not moment(run):
        time.sleep(0.005)
    os.kill(children(process)[-1], signum)
    output, _ = process.communicate(timeout=200)
    return process.wait(), output


def children(process: warm.WarmProcess) -> list[int]:
    """Return the processes that a process has started, in order."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
