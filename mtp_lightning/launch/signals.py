"""What signals ask of a process that trains: to stop as soon as nothing is lost by it."""

import contextlib
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
STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP)
"""What Slurm sends before a time limit (`--signal`, by a site's choice) and at a preemption, and what a terminal sends
that is closed. All of them end with `REQUEUE`: the run is sent away, and nobody has said that it should not go on."""


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
            say_at_once(f"{name} before the first step: nothing to save, exit code {REQUEUE}")
            raise SystemExit(REQUEUE)
        if is_first:
            say_at_once(f"{name}: stopping after this step, with a checkpoint and exit code {REQUEUE}")


def heeded_signals() -> list[signal.Signals]:
    """List the stop signals, without those that this process was started to ignore, as `nohup` does with SIGHUP."""
    return [signum for signum in STOP_SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]


@contextmanager
def stop_on_signals(stop: StopRequest) -> Iterator[StopRequest]:
    """Let the stop signals of this process ask for a stop in the body; only the main thread can handle signals."""
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    former = {signum: signal.signal(signum, stop.ask) for signum in heeded_signals()}
    try:
        yield stop
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)


@contextmanager
def ending_at_signals(doing: str) -> Iterator[None]:
    """End this process at once when a stop signal or Ctrl-C comes in the body, where there is nothing to save.

    For a body that waits for long outside of Python: handlers run only when it has come back, this does not wait for
    it. A thread is woken by the signals themselves.

    Args:
        doing: what the process does in the meantime, for the message.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    former = signal.set_wakeup_fd(writer)
    watcher = threading.Thread(target=_end_at_signal, args=(reader, doing), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former)
        os.close(writer)  # which ends the watcher
        watcher.join()
        os.close(reader)


def _end_at_signal(reader: int, doing: str) -> None:
    while number := os.read(reader, 1):
        signum = number[0]
        if signum in (signal.SIGINT, *STOP_SIGNALS):
            exit_code = INTERRUPTED if signum == signal.SIGINT else REQUEUE
            say_at_once(f"{signal.Signals(signum).name} while {doing}: nothing to save, exit code {exit_code}")
            os._exit(exit_code)


def say_at_once(text: str, *, end: str = "\n") -> None:
    """Write to stderr from a handler: not by print, which the signal may have come in the middle of.

    With its terminal closed stderr takes nothing any more, which must not keep the process from stopping well.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"{text}{end}".encode())
