"""Ctrl-C, preemption and time limits that lose nothing."""

import os
import signal
import threading
from types import FrameType
from typing import Any, cast, final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mtp_lightning.launch.signals import INTERRUPTED, REQUEUE, StopRequest, say_at_once
from mtp_lightning.training.lightning_module import MtpLightningModule
from mtp_lightning.training.saving.save_checkpoints import Checkpoints
from mtp_lightning.training.strategies.base import RunStrategy

_NOTICE = "Stopping after this step, with a checkpoint. Ctrl-C again stops at once."
_STOP_LEVELS = (0, INTERRUPTED, REQUEUE)
"""Exit codes by stop level; the highest prevails: a preempted job is requeued, whatever else it was asked."""


@final
class Interruption(Callback):
    """Answer a stop signal or the first Ctrl-C by finishing the step, saving a checkpoint and stopping.

    Ranks agree, so that all save the same step: each rank's stop level rides along in the reduction that every step
    begins with (`step/vote.py`), so the one after the next step at the latest is the last. A validation in
    progress is finished first, and a save in the background too. More stop signals change nothing; a second Ctrl-C
    stops at once. The stop is a KeyboardInterrupt raised between two steps, so that Lightning tears everything down as
    usual. Only the main thread can handle signals; elsewhere Ctrl-C is left alone.
    """

    def __init__(self, checkpoints: Checkpoints, stop: StopRequest) -> None:
        self._checkpoints = checkpoints
        self._stop = stop
        self._former: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over Ctrl-C, and only remember other stop signals from now on."""
        self._stop.defer()
        cast(MtpLightningModule, pl_module).step_vote.own_level = self._stop_level
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop here if any rank was asked to."""
        has_others = cast(RunStrategy, trainer.strategy).ranks.size > 1
        agreed = cast(MtpLightningModule, pl_module).step_vote.agreed_level
        exit_code = _STOP_LEVELS[agreed if has_others else self._stop_level()]
        if exit_code:
            self._stop.exit_code = exit_code
            self._checkpoints.save(trainer)
            self._checkpoints.finish(trainer)
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give Ctrl-C back."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give Ctrl-C back."""
        self._give_back()

    def _stop_level(self) -> int:
        return _STOP_LEVELS.index(self._stop.exit_code)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self._stop.exit_code = self._stop.exit_code or INTERRUPTED
        self._give_back()
        if os.isatty(2):
            say_at_once(f"\r{_NOTICE}", end="\x1b[K")  # in place of the last line of a live view
        else:
            say_at_once(_NOTICE)

    def _give_back(self) -> None:
        if self._former is not None:
            signal.signal(signal.SIGINT, self._former)
            self._former = None
