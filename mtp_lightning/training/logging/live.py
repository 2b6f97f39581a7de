"""Watching a run: a live table on a terminal, one line per logged step elsewhere."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mtp_lightning.console.screen import Screen
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.trainable import ADDED
from mtp_lightning.training.logging.columns import ROLES
from mtp_lightning.training.logging.metrics_files import read_rows
from mtp_lightning.training.logging.progress import Progress, bits_unit
from mtp_lightning.training.saving.save_checkpoints import Checkpoints

BLANK = "-"


def live_view(progress: Progress) -> RenderableType:
    """Build the whole view: a row per offset, a bar, the state of the run; fits 80 columns.

    The last line is not the bar, which fills its line: a terminal echoes ^C behind the cursor.
    """
    lines = (Text(line, no_wrap=True, overflow="ellipsis") for line in status_lines(progress))
    return Group(offsets_table(progress), _bar(progress), *lines)


def offsets_table(progress: Progress) -> Table:
    """Build a table with a row per offset, validation after training."""
    num_offsets = progress.recipe.heads.num_offsets
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    heads = ["\noffset", "loss\nnats", bits_unit(progress.recipe).replace("/", "\n/"), "top-1\nlabel"]
    if num_offsets > 1:
        heads += ["agree\nw. main", "accept\ncond.", "accept\ncumul."]
    heads += ["val\nloss"] + (["val\ncumul."] if num_offsets > 1 else [])
    for head in heads:
        style = "cyan" if head.startswith("val") else ""
        table.add_column(head, justify="right", style=style, min_width=6, no_wrap=True)
    for k in range(1, num_offsets + 1):
        table.add_row(*_offset_row(progress, k))
    return table


def _offset_row(progress: Progress, k: int) -> list[str]:
    train, validation = progress.train, progress.validation
    loss = train.get(f"train/loss_{k}", math.nan)
    top_1 = train.get(f"train/label_accuracy_{k}")
    cells = [str(k), number(loss), number(loss / math.log(2)), share(top_1)]
    if progress.recipe.heads.num_offsets > 1:
        kinds = ("agreement", "conditional_acceptance_rate", "acceptance_rate")
        cells += [share(train.get(f"train/{kind}_{k}")) for kind in kinds]
    cells.append(number(validation.get(f"val/loss_{k}")))
    if progress.recipe.heads.num_offsets > 1:
        cells.append(share(validation.get(f"val/acceptance_rate_{k}")))
    return cells


def status_lines(progress: Progress) -> list[str]:
    """State the run in short lines."""
    train = progress.train
    norms = {role: f"{role} {number(train.get(f'grad_norm/{role}'), '.2g')}" for role in ROLES}
    added = [norms[role] for role in ADDED if f"grad_norm/{role}" in train]
    own = "  ".join(norm for role, norm in norms.items() if role not in ADDED)
    lines = [
        f"grad norm  {own}   lr {number(train.get('lr'), '.2e')}",
        *(["           " + "  ".join(added)] if added else []),
        f"{count(progress.tokens)} tokens  {_speed(train)}"
        f"  {number(train.get('memory_gib'), '.2f')} GiB"
        f"  last checkpoint {f'step {progress.saved_step:,}' if progress.saved_step else BLANK}",
    ]
    if progress.recipe.heads.num_offsets > 1:
        lines.insert(len(lines) - 1, f"acceptance length  {_lengths(progress)}")
    return lines


def _speed(train: Mapping[str, float]) -> str:
    share = f"  {train['mfu']:.0%} MFU" if "mfu" in train else ""
    return f"{count(train.get('tokens_per_s'))} tokens/s{share}"


def _lengths(progress: Progress) -> str:
    length = number(progress.train.get("train/mean_acceptance_length"), ".2f")
    if progress.validated_step is None:
        return f"train {length}  val {BLANK}"
    validated = number(progress.validation.get("val/mean_acceptance_length"), ".2f")
    best = progress.best
    so_far = f"best {best.mean_acceptance_length:.2f} at step {best.step:,}" if best else f"best {BLANK}"
    if best and best.step == progress.validated_step:
        so_far = "the best so far"
    return f"train {length}  val {validated} at step {progress.validated_step:,} ({so_far})"


def _bar(progress: Progress) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for ratio in (None, 1, None):
        grid.add_column(ratio=ratio, no_wrap=True)
    grid.add_row(
        Text(f"step {progress.step:,}/{progress.total_steps:,}", style="bold"),
        ProgressBar(total=progress.total_steps, completed=progress.step),
        f"ETA {duration(progress.eta_s)}",
    )
    return grid


def plain_line(progress: Progress) -> str:
    """Put a logged step on one line."""
    train = progress.train
    return "  ".join(
        [
            f"step {progress.step}/{progress.total_steps}",
            f"{count(progress.tokens)} tokens",
            *_figures(train, "train", progress.recipe.heads.num_offsets),
            _speed(train),
            f"ETA {duration(progress.eta_s)}",
        ]
    )


def plain_validation(progress: Progress) -> str:
    """Put a validation on one line."""
    figures = _figures(progress.validation, "val", progress.recipe.heads.num_offsets)
    return "  ".join([f"validation at step {progress.validated_step}", *figures])


def _figures(metrics: dict[str, float], split: str, num_offsets: int) -> list[str]:
    offsets = range(1, num_offsets + 1)
    figures = ["loss " + " ".join(number(metrics.get(f"{split}/loss_{k}")) for k in offsets)]
    if num_offsets > 1:
        accepted = " ".join(share(metrics.get(f"{split}/acceptance_rate_{k}")) for k in offsets[1:])
        figures.append(f"accepted {accepted}")
        figures.append(f"length {number(metrics.get(f'{split}/mean_acceptance_length'), '.2f')}")
    return figures


def number(value: float | None, form: str = ".3f") -> str:
    """Format a figure that may be missing."""
    return BLANK if value is None or math.isnan(value) else format(value, form)


def share(value: float | None) -> str:
    """Format a share of positions as a percentage."""
    return number(value, ".1%")


def count(value: float | None) -> str:
    """Format a count with three digits.

    >>> count(1_640_000)
    '1.64M'
    """
    if value is None or math.isnan(value):
        return BLANK
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}" if value < 999.5 * size else f"{value / size:.0f}{letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Format a time span.

    >>> duration(3725)
    '1:02:05'
    """
    if not math.isfinite(seconds):
        return BLANK
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


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
        self._console = self._console or Screen()
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
