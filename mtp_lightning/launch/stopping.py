"""What signals ask of a process that trains: to stop as soon as nothing is lost by it."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final

REQUEUE = 85
HANG = 89
INTERRUPTED = 130
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
"""What Slurm sends before a time limit (`--signal`, by a site's choice) and at a preemption."""


@final
class StopRequest:
    """Remembers that this process was asked to stop.

    Until `defer` is called there is nothing to save, so a signal ends the process at once; from then on it is only
    remembered, however often it comes, and whoever trains looks at `exit_code` between two steps.

    Attributes:
        exit_code: what the process should end with; 0 while nobody has asked.
        is_deferred: whether signals are only remembered.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self.is_deferred = False

    def defer(self) -> None:
        """From now on only remember: there is something to save."""
        self.is_deferred = True

    def ask(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal; raise SystemExit where nothing is lost by it."""
        is_first = not self.exit_code
        self.exit_code = REQUEUE
        name = signal.Signals(signum).name
        if not self.is_deferred:
            _say(f"{name} before the first step: nothing to save, exit code {REQUEUE}")
            raise SystemExit(REQUEUE)
        if is_first:
            _say(f"{name}: stopping after this step, with a checkpoint and exit code {REQUEUE}")


@contextmanager
def heeding_signals(stop: StopRequest) -> Iterator[StopRequest]:
    """Let the stop signals of this process ask for a stop in the body; only the main thread can handle signals."""
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    former = {signum: signal.signal(signum, stop.ask) for signum in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)


def _say(text: str) -> None:
    """Write a line from a handler: not by print, which the signal may have come in the middle of."""
    os.write(2, f"{text}\n".encode())
