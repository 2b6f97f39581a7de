"""What Lightning and DeepSpeed remark that says nothing about a run: kept from the terminal."""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import final

from mtp_lightning.console.progress import say
from mtp_lightning.errors import refusal_of


@contextlib.contextmanager
def ignore_known_warnings() -> Iterator[None]:
    """Ignore in the body what Lightning and DeepSpeed warn of and a run has seen to."""
    with warnings.catch_warnings():
        # One batch is one step and cheap to read: no worker is a choice (data.workers), not an oversight.
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        # Lightning 2.6 on torch 2.13; can go when Lightning no longer uses LeafSpec.
        warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
        # Lightning 2.6 says so wherever Slurm is installed, also inside ranks that srun has started.
        warnings.filterwarnings("ignore", message=".*`srun` command is available.*")
        # DeepSpeed 0.19 on torch 2.13; can go when it calls the collectives by their new names.
        warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated.*")
        yield


@final
class _LibraryLog(logging.FileHandler):
    """A file of remarks, which a run does without where it cannot be written; that is said once."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Say it, in place of a traceback for each remark."""
        refusal = sys.exc_info()[1]
        if not isinstance(refusal, OSError):
            super().handleError(record)
        elif not self._has_failed:
            self._has_failed = True
            say(f"remarks of libraries are not kept: {refusal_of(refusal, Path(self.baseFilename))}", stderr=True)


@contextlib.contextmanager
def redirect_library_logs(path: Path) -> Iterator[None]:
    """Keep Lightning's remarks out of the live view: they go to the attempt's log."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    former = [(logger.handlers, logger.propagate) for logger in loggers]
    handler = _LibraryLog(path, encoding="utf-8", errors="backslashreplace")
    logging.raiseExceptions = False  # nor a traceback where another's log takes nothing
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    with ignore_known_warnings():
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # what it still holds has been said to be lost
                handler.close()
            logging.raiseExceptions = True
            for logger, (handlers, propagate) in zip(loggers, former, strict=True):
                logger.handlers, logger.propagate = handlers, propagate
