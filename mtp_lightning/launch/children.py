"""Processes of `mtp` that belong to this one: they hear its signals and die with it."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import IO

from mtp_lightning.launch.signals import heeded_signals

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def start_mtp(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    stdout: IO[bytes] | int | None = None,
    stderr: IO[bytes] | int | None = None,
) -> "subprocess.Popen[bytes]":
    """Start `mtp` with these arguments; it is killed when this process ends, however it ends."""
    libc = ctypes.CDLL(None)
    return subprocess.Popen(
        [sys.executable, "-m", "mtp_lightning", *arguments],
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
        preexec_fn=lambda: libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL),
    )


@contextmanager
def signals_passed_on(processes: Sequence["subprocess.Popen[bytes]"]) -> Iterator[list[int]]:
    """Send interrupts and stop signals of this process to all of them; yield a list of those that have come.

    What this process ignores the others ignore too.
    """
    heard: list[int] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        heard.append(signum)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signum)

    former = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGINT, *heeded_signals())}
    try:
        yield heard
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)
