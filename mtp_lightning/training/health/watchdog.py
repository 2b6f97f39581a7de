"""A run that has stopped moving is ended, so that its job can be started again."""

import faulthandler
import os
import platform
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mtp_lightning.launch.signals import HANG
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.lightning_module import MtpLightningModule

FIRST_STEPS = 3  # which compile, connect and allocate
SLOW_FACTOR = 6  # how much longer first steps and saves may take
WINDOW_STEPS = 50
LOOKS = 20  # per limit
MOST_PAUSES = 2  # between two looks; where more have passed the whole process has stood still
WRITE_S = 10.0  # a file system that hangs must not keep the process from ending


@final
class Watchdog(Callback):
    """End this rank with exit code 89 when nothing has moved for too long; the stacks of its threads are kept.

    Too long is `health.hang_after_s`, or `health.hang_factor` median steps if that is more; six times that for what is
    slow by nature. Every rank has a thread that looks; the other ranks wait for the one that hangs, so all of them end.
    Time in which the whole process was stopped (SIGSTOP, a suspended machine) does not count: it could not move.
    """

    def __init__(self, recipe: Recipe, run_folder: Path, *, end: Callable[[int], object] = os._exit) -> None:
        self._least_s = recipe.health.hang_after_s
        self._factor = recipe.health.hang_factor
        self._checkpoint = recipe.checkpoint
        self._run_folder = run_folder
        self._end = end
        self._durations_s: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._median_s = 0.0
        self._step = self._rank = 0
        self._moved_at = self._began_at = 0.0
        self._what, self._is_slow = "", True
        self._is_over = threading.Event()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to look."""
        self._rank, self._step = trainer.global_rank, trainer.global_step
        self._move("before the first step", is_slow=True)
        if self._least_s is not None:
            threading.Thread(target=self._look, args=(self._least_s,), name="watchdog", daemon=True).start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins."""
        self._move("in a step", is_slow=len(self._durations_s) < FIRST_STEPS)
        self._began_at = self._moved_at

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step is over; a save may follow."""
        self._step = trainer.global_step
        self._durations_s.append(time.monotonic() - self._began_at)
        if len(self._durations_s) <= FIRST_STEPS or self._step % WINDOW_STEPS == 0:
            self._median_s = statistics.median(self._durations_s)
        is_saved = self._checkpoint.is_due(self._step) or cast(MtpLightningModule, pl_module).step_vote.save_due
        self._move("between steps", is_slow=is_saved)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """A validation moves on."""
        self._move("in a validation", is_slow=False)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A save begins."""
        self._move("in a save", is_slow=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look no longer."""
        self._is_over.set()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Look no longer."""
        self._is_over.set()

    def _move(self, what: str, *, is_slow: bool) -> None:
        self._moved_at, self._what, self._is_slow = time.monotonic(), what, is_slow

    def _look(self, least_s: float) -> None:
        pause_s, waited_s, looked_at = least_s / LOOKS, 0.0, self._moved_at
        while not self._is_over.wait(pause_s):
            limit_s = max(least_s, self._factor * self._median_s) * (SLOW_FACTOR if self._is_slow else 1)
            now, moved_at = time.monotonic(), self._moved_at
            if moved_at > looked_at:
                waited_s, looked_at = 0.0, moved_at
            waited_s += min(now - looked_at, MOST_PAUSES * pause_s)
            looked_at = now
            if waited_s > limit_s and not self._is_over.is_set():
                self._give_up(waited_s, limit_s)
                return

    def _give_up(self, waited_s: float, limit_s: float) -> None:
        what = (
            f"rank {self._rank} on {platform.node()}: nothing has moved for {waited_s:.1f} s {self._what} "
            f"after step {self._step}, where {limit_s:.1f} s are allowed"
        )
        print(f"{what}; exit code {HANG}", file=sys.stderr, flush=True)
        writer = threading.Thread(target=self._write, args=(what,), daemon=True)
        writer.start()
        writer.join(WRITE_S)
        self._end(HANG)

    def _write(self, what: str) -> None:
        attempts = (self._run_folder / "logs").glob("attempt_*")
        newest = max(attempts, key=lambda path: int(path.name.removeprefix("attempt_")), default=self._run_folder)
        with (newest / f"hang_rank_{self._rank}.txt").open("w", encoding="utf-8", errors="backslashreplace") as file:
            print(f"{what}\n", file=file, flush=True)
            faulthandler.dump_traceback(file=file, all_threads=True)
