"""What a checkpoint is made of, and writing it beside the training."""

import copy
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import torch.distributed as dist

from mtp_lightning.checkpoint.format.state_tree import write_state
from mtp_lightning.checkpoint.format.write_shards import write_pieces
from mtp_lightning.files.durable import FileRecord
from mtp_lightning.ranks import Ranks
from mtp_lightning.training.strategies.base import RunStrategy
from mtp_lightning.training.strategies.param_shards import steps_of


def rng_state() -> dict[str, Any]:
    """Read the generators of Python, numpy, torch and, where CUDA is in use, this rank's device."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators back; this rank's device is the current one, whatever its number was when it was saved."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for device_state in state["cuda"][:1]:
            torch.cuda.set_rng_state(device_state)


@final
class Snapshot:
    """This rank's part of a checkpoint: shards of every parameter, and on the first rank Lightning's own state."""

    def __init__(self, strategy: RunStrategy, *, copied: bool) -> None:
        """Take it from a strategy that has just captured Lightning's state.

        Args:
            strategy: holds weights and moments.
            copied: take copies in host memory, so that training may go on before they are written.
        """
        self._rank, self._num_ranks = strategy.ranks.rank, strategy.ranks.size
        shards = [*strategy.saved_shards()]
        steps = steps_of(shards)
        self._pieces = [shard.piece(step, copied=copied) for shard, step in zip(shards, steps, strict=True)]
        self._state = copy.deepcopy(strategy.captured) if copied else strategy.captured

    def write(self, folder: Path) -> dict[str, FileRecord]:
        """Write this rank's files and force them to disk."""
        records = write_pieces(folder, self._pieces, self._rank, self._num_ranks)
        if self._rank == 0:
            records |= write_state(folder, self._state)
        return records


@final
class BackgroundWriter:
    """Runs one job at a time that all ranks take part in: at once, or in a thread with a process group of its own."""

    def __init__(self, *, in_background: bool) -> None:
        """All ranks make one; the group is made here, because that is collective too."""
        self.in_background = in_background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        has_group = in_background and dist.is_available() and dist.is_initialized()
        self._ranks = Ranks(dist.new_group(backend="gloo") if has_group else None)

    def run(self, job: Callable[[Ranks], Any]) -> None:
        """Run a job after the one before; in the background its error is raised by the next `wait`."""
        self.wait()
        if not self.in_background:
            job(self._ranks)
            return
        self._thread = threading.Thread(target=self._guarded, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            CheckpointError: What was being written could not be.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _guarded(self, job: Callable[[Ranks], Any]) -> None:
        try:
            job(self._ranks)
        except BaseException as error:
            self._error = error
