"""Ctrl-C that loses nothing."""

import os
import signal
import threading
from types import FrameType
from typing import Any, cast, final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mtp_lightning.training.callbacks.checkpoints import Checkpoints
from mtp_lightning.training.strategy import RunStrategy

_NOTICE = "Stopping after this step, with a checkpoint. Ctrl-C again stops at once."


@final
class Interruption(Callback):
    """Answer the first Ctrl-C by finishing the step, saving a checkpoint and stopping; the second stops at once.

    The stop is a KeyboardInterrupt raised between two steps, so that Lightning tears everything down as usual.
    Only the main thread can handle signals; elsewhere this does nothing.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._former: Any = None
        self._is_asked = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over Ctrl-C."""
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGINT, self._ask)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop here if any rank was asked to."""
        if cast(RunStrategy, trainer.strategy).ranks.any(self._is_asked):
            self._checkpoints.save(trainer)
            self._checkpoints.finish(trainer)
            raise KeyboardInterrupt

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give Ctrl-C back."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give Ctrl-C back."""
        self._give_back()

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self._is_asked = True
        self._give_back()
        # Not print: the signal may have come in the middle of one. In place of the last line of a live view.
        notice = f"\r{_NOTICE}\x1b[K" if os.isatty(2) else f"{_NOTICE}\n"
        os.write(2, notice.encode())

    def _give_back(self) -> None:
        if self._former is not None:
            signal.signal(signal.SIGINT, self._former)
            self._former = None
