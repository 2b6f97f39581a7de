"""How a command ends at a signal: it puts away what it has begun, as at Ctrl-C, and then ends by that very signal.

A shell that runs commands in a loop goes on with the next one unless the last was ended by a signal: an exit code of
130 does not tell it that Ctrl-C was meant for the loop as well.
"""

import atexit
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import final

from mtp_lightning.launch.signals import INTERRUPTED, REQUEUE

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE_S = 3.0  # in which further signals of an impatient user, or of a group, do not disturb the putting away
LAST_S = 5.0  # for threads and libraries to end once all is put away


@final
class Interrupt(KeyboardInterrupt):
    """A signal that ends a command; passes whatever Ctrl-C passes."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum


def code_and_words(interrupt: KeyboardInterrupt) -> tuple[int, str]:
    """Return the exit code of an interrupt, as shells count, and what to say."""
    signum = interrupt.signum if isinstance(interrupt, Interrupt) else signal.SIGINT
    return 128 + signum, "interrupted" if signum == signal.SIGINT else f"ended by {signal.Signals(signum).name}"


def end_with(code: int) -> None:
    """End as processes have ended that were waited for, if they were ended by a signal that was for this one, too.

    Raises:
        Interrupt: The exit code, as shells count, is that of such a signal.
    """
    if code - 128 in ENDING_SIGNALS:
        raise Interrupt(code - 128)


@final
class Ending:
    """Turns the first signal into an exception, and sees to it that the command comes to an end after it."""

    def __init__(self) -> None:
        self._signum = 0
        self._asked_at = 0.0
        self._last_signum = 0
        self._is_over = False
        self._pid = os.getpid()

    def begin(self) -> None:
        """Heed signals, but for those that this process was started to ignore; training has handlers of its own."""
        for signum in ENDING_SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._ask)
        atexit.register(self._end_by_signal)  # the first to be registered is the last to be called

    def finish(self, code: object) -> object:
        """Return the code to end with, given what the command would end with; from now on signals end it at once."""
        self._is_over = True
        if self._signum and code not in (None, 0, REQUEUE, INTERRUPTED):  # libraries make other codes of an interrupt
            code = 128 + self._signum
        self._last_signum = next((signum for signum in ENDING_SIGNALS if code == 128 + signum), 0)
        if self._last_signum and self._signum:  # whoever trains has a time of its own
            threading.Thread(target=self._end_in_time, daemon=True).start()
        return code

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self._is_over or os.getpid() != self._pid:  # processes that were forked have nothing to put away
            _die_by(self._last_signum or signum)
        is_first = not self._signum
        if not is_first and time.monotonic() - self._asked_at < PATIENCE_S:
            return
        self._signum, self._asked_at = self._signum or signum, time.monotonic()
        raise Interrupt(self._signum)

    def _end_in_time(self) -> None:
        time.sleep(LAST_S)
        self._end_by_signal()

    def _end_by_signal(self) -> None:
        if self._last_signum:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None and not stream.closed:
                    stream.flush()
            _die_by(self._last_signum)


def _die_by(signum: int) -> None:
    """End this process by a signal as if nobody heeded it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
    os._exit(128 + signum)
