"""Watching a run: a live table on a terminal, one line per logged step elsewhere."""

import time
from pathlib import Path
from typing import Any, final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.live import Live

from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.logging.metrics_table import read_rows
from mtp_lightning.training.logging.progress import Progress
from mtp_lightning.training.logging.rendering import live_view, plain_line, plain_validation
from mtp_lightning.training.saving.save_checkpoints import Checkpoints

SHORTEST_PAUSE_S = 0.25


@final
class LiveView(Callback):
    """Show the run on rank 0.

    The table is redrawn in place after logged steps and validations, the bar in between, at most four times a
    second; there is no thread. Where the console is no terminal, each logged step and each validation is a line.
    """

    def __init__(
        self, recipe: Recipe, run_folder: Path, checkpoints: Checkpoints, console: Console | None = None
    ) -> None:
        self._progress = Progress(recipe)
        self._metrics_path = run_folder / "metrics.csv"
        self._checkpoints = checkpoints
        self._console = console
        self._live: Live | None = None
        self._is_shown = False
        self._drawn_at = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the view, after a resume with the figures of before."""
        if not trainer.is_global_zero:
            return
        self._is_shown = True
        progress = self._progress
        progress.step = trainer.global_step
        for row in read_rows(self._metrics_path):
            if row["step"] <= progress.step:
                progress.take(row, int(row["step"]))
        progress.saved_step = self._checkpoints.last_step
        self._console = self._console or Console()
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(live_view(progress), console=self._console, auto_refresh=False)
            self._live.start(refresh=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show a logged step; move the bar after any other."""
        self._progress.advance(trainer.global_step)
        is_logged = self._take(trainer, pl_module)
        if is_logged and self._is_shown and not self._live:
            self._print(plain_line(self._progress))
        self._draw()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the validation's figures."""
        if trainer.sanity_checking or not self._take(trainer, pl_module):
            return
        if self._is_shown and not self._live:
            self._print(plain_validation(self._progress))
        self._draw()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the last state on the screen."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._close()

    def _take(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        metrics = getattr(pl_module, "metrics", {})
        self._progress.take(metrics, trainer.global_step)
        return bool(metrics)

    def _draw(self, *, is_last: bool = False) -> None:
        now = time.monotonic()
        if self._live and (is_last or now - self._drawn_at >= SHORTEST_PAUSE_S):
            self._drawn_at = now
            self._progress.saved_step = self._checkpoints.last_step
            self._live.update(live_view(self._progress), refresh=True)

    def _print(self, line: str) -> None:
        assert self._console is not None
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _close(self) -> None:
        if self._live:
            self._draw(is_last=True)
            self._live.stop()
            self._live = None
