"""Loggers that fail: training goes on, the rows wait, and it is said."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import final

from lightning.pytorch.loggers import Logger

from mtp_lightning.errors import MtpError

PAUSE_S = 300.0
KEPT = "metrics.csv has every row"


@contextlib.contextmanager
def outage_reported(name: str, then: str = KEPT) -> Iterator[None]:
    """Report on stderr what fails in the body, unless it must stop the run (`MtpError`)."""
    try:
        yield
    except MtpError:
        raise
    except Exception as error:  # each library has exceptions of its own, and of those below it
        with contextlib.suppress(OSError):  # the disk of stderr may be what is full
            print(f"{name} failed: {type(error).__name__}: {error}; {then}", file=sys.stderr, flush=True)


@final
class LoggerQueue:
    """Rows on their way to a logger; while it fails they wait, and it is asked again every five minutes."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._rows: list[tuple[int, Mapping[str, float]]] = []
        self._rests_until = 0.0
        self._name = type(logger).__name__.strip("_").lower()

    def send(self, step: int, row: Mapping[str, float]) -> None:
        """Log a row, and those that wait before it."""
        self._rows.append((step, row))
        if time.monotonic() >= self._rests_until:
            self._flush(f"training goes on, its rows are sent later, {KEPT}")

    def close(self) -> None:
        """Try the rows that wait for the last time."""
        if self._rows:
            self._flush(f"{len(self._rows)} rows are not sent, {KEPT}")
            self._rows = []

    def _flush(self, then: str) -> None:
        self._rests_until = time.monotonic() + PAUSE_S
        with outage_reported(self._name, then):
            while self._rows:
                step, row = self._rows[0]
                self._logger.log_metrics(dict(row), step)
                self._rows.pop(0)
            self._rests_until = 0.0
