"""What Lightning and DeepSpeed remark that says nothing about a run: kept from the terminal."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path


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


@contextlib.contextmanager
def redirect_library_logs(path: Path) -> Iterator[None]:
    """Keep Lightning's remarks out of the live view: they go to the attempt's log."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    former = [(logger.handlers, logger.propagate) for logger in loggers]
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    with ignore_known_warnings():
        try:
            yield
        finally:
            handler.close()
            for logger, (handlers, propagate) in zip(loggers, former, strict=True):
                logger.handlers, logger.propagate = handlers, propagate
