"""The end of a run on one screen, in one file, in one picture."""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any, final

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from mtp_lightning.checkpoint.format.folder import CheckpointFolder, name_of_step
from mtp_lightning.console.plots import label_of
from mtp_lightning.console.screen import Screen
from mtp_lightning.errors import RunFolderError, refusal_of
from mtp_lightning.files.durable import replace_durably
from mtp_lightning.files.untrusted import OddFileError, read_object
from mtp_lightning.planner.flops import tokens_after
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.logging.curves import draw_training_curves
from mtp_lightning.training.logging.live import count, duration, number, share
from mtp_lightning.training.logging.metrics_files import Row, read_rows
from mtp_lightning.training.logging.progress import bits_unit
from mtp_lightning.training.saving.save_checkpoints import Checkpoints


@final
class Summary(Callback):
    """Write summary.json, draw curves.png where asked for, and print a table, when training ends or is interrupted.

    The figures are those of metrics.csv, so they are there after a resume as well. The clock of an attempt starts
    when the callback is made.
    """

    def __init__(
        self, recipe: Recipe, run_folder: Path, checkpoints: Checkpoints, console: Console | None = None
    ) -> None:
        self._recipe = recipe
        self._run_folder = run_folder
        self._checkpoints = checkpoints
        self._console = console
        self._began_at = time.monotonic()
        self._earlier_s = 0.0
        self._is_training = False
        self._has_ended = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on there is something to summarise."""
        self._is_training = trainer.is_global_zero

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Summarise a run that ended by itself."""
        self._has_ended = True
        if self._is_training:
            self._summarise(trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Summarise an interrupted run; after a failure leave the screen to its message."""
        if not self._is_training:
            return
        with contextlib.suppress(OSError, RunFolderError):  # a full disk may be what failed; its error is on its way
            if isinstance(exception, KeyboardInterrupt):
                self._summarise(trainer.global_step)
            else:
                self._write(self._content(trainer.global_step))

    def state_dict(self) -> dict[str, Any]:
        """Time spent until now."""
        return {"wall_s": self._earlier_s + time.monotonic() - self._began_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the time that earlier attempts spent."""
        self._earlier_s = state_dict["wall_s"]

    def complete(self, checkpoint: CheckpointFolder) -> None:
        """Write what a run that ended with a checkpoint had no room or no time to write: pointers, summary, curves.

        Raises:
            CheckpointError, RunFolderError: There is still no room.
        """
        checkpoints, path = self._checkpoints, self._run_folder / "summary.json"
        checkpoints.look_for_best()
        checkpoints.point_at(checkpoint.step)
        is_drawn = not self._recipe.logging.curves or (self._run_folder / "curves.png").exists()
        if is_drawn and _is_ending(path, checkpoint.step):
            return
        states = checkpoint.state()["callbacks"]
        checkpoints.last_step = checkpoint.step
        checkpoints.seconds_saving = states.get(Checkpoints.__qualname__, {}).get("seconds_saving", 0.0)
        self._earlier_s = states.get(Summary.__qualname__, {}).get("wall_s", 0.0)
        self._has_ended = True
        self._summarise(checkpoint.step)

    def _summarise(self, step: int) -> None:
        content = self._content(step)
        is_drawn = self._recipe.logging.curves
        try:
            self._write(content)
            if is_drawn:
                self._draw(content["tokens"])
        except OSError as error:
            saved = self._checkpoints.last_step
            raise RunFolderError(
                "the summary of a run must be written into its folder",
                refusal_of(error, self._run_folder),
                f"Make room or repair access, then run the same command again: {name_of_step(saved or 0)} is complete",
            ) from error
        console = self._console or Screen()
        console.print(summary_view(content))
        console.print(
            f"files  {self._run_folder}/summary.json, {'curves.png, ' if is_drawn else ''}metrics.csv",
            soft_wrap=True,
        )

    def _draw(self, num_tokens: int) -> None:
        recipe = self._recipe
        losses_in = f"nats per {bits_unit(recipe).removeprefix('bits/')}"
        title = f"{label_of(recipe.name)}: n = {recipe.heads.num_offsets}, {count(num_tokens)} tokens"
        csv_path, png_path = self._run_folder / "metrics.csv", self._run_folder / "curves.png"
        draw_training_curves(csv_path, png_path, title=title, unit=losses_in)

    def _content(self, step: int) -> dict[str, Any]:
        recipe, checkpoints = self._recipe, self._checkpoints
        attempt_s = time.monotonic() - self._began_at
        last, best = checkpoints.last_step, checkpoints.best
        rows = [row for row in read_rows(self._run_folder / "metrics.csv") if row["step"] <= step]
        return {
            "recipe": recipe.name,
            "seed": recipe.run.seed,
            "num_offsets": recipe.heads.num_offsets,
            "is_finished": self._has_ended or step >= recipe.run.steps,
            "ended_early": self._has_ended and step < recipe.run.steps,
            "steps": step,
            "tokens": tokens_after(recipe, step),
            "wall_s": {"attempt": attempt_s, "total": self._earlier_s + attempt_s},
            "checkpoints_s": checkpoints.seconds_saving,
            "last_checkpoint": name_of_step(last) if last else None,
            "best_checkpoint": best
            and {"name": name_of_step(best.step), "mean_acceptance_length": best.mean_acceptance_length},
            "bits_unit": bits_unit(recipe),
            "training": _figures(rows, "train", recipe.heads.num_offsets),
            "validation": _figures(rows, "val", recipe.heads.num_offsets),
            "validation_by_source": {
                source: _figures(rows, "val", recipe.heads.num_offsets, of=f"@{source}")
                for source in recipe.data.mixture
            },
        }

    def _write(self, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2, allow_nan=False)
        replace_durably(self._run_folder / "summary.json", text.encode() + b"\n")


def complete_ending(recipe: Recipe, run_folder: Path, checkpoint: CheckpointFolder) -> None:
    """Write what a run, or a phase, that has ended with a checkpoint lacks (`Summary.complete`)."""
    checkpoints = Checkpoints(recipe, run_folder / "checkpoints", layers={})
    Summary(recipe, run_folder, checkpoints).complete(checkpoint)


def _is_ending(path: Path, step: int) -> bool:
    """Tell whether a summary is that of a run which ended with this step."""
    try:
        content = read_object(path)
    except (OSError, OddFileError):
        return False
    return content.get("is_finished") is True and content.get("steps") == step


def _figures(rows: list[Row], split: str, num_offsets: int, of: str = "") -> dict[str, Any] | None:
    """Collect the last figures of training or validation, or of one source; None where there are none."""
    row = next((row for row in reversed(rows) if f"{split}/loss_1" in row), None)
    if row is None:
        return None
    figures: dict[str, Any] = {
        "step": row["step"],
        "mean_acceptance_length": _finite(row.get(f"{split}/mean_acceptance_length{of}")),
    }
    for kind in ("loss", "label_accuracy", "agreement", "conditional_acceptance_rate", "acceptance_rate"):
        names = {k: f"{split}/{kind}_{k}{of}" for k in range(1, num_offsets + 1)}
        figures[kind] = {str(k): _finite(row.get(name)) for k, name in names.items() if name in row}
    losses = figures["loss"].items()
    figures["bits"] = {k: None if loss is None else loss / math.log(2) for k, loss in losses}
    return figures


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def summary_view(content: dict[str, Any]) -> RenderableType:
    """Lay out a summary: a row per offset, then the run as a whole."""
    validation, best, wall_s = content["validation"] or {}, content["best_checkpoint"], content["wall_s"]
    state = "finished" if content["is_finished"] else "interrupted"
    length = number(validation.get("mean_acceptance_length"), ".3f")
    best_name = f"{best['name']} (acceptance length {best['mean_acceptance_length']:.3f})" if best else "none"
    title = f"{content['recipe']}: {state} after {content['steps']:,} steps, {count(content['tokens'])} tokens"
    lines: list[str | Table] = [
        f"validation at step {validation['step']:,}" if validation else "no validation yet",
        _validation_table(content, validation),
        f"expected acceptance length  {length} tokens per forward",
        *(
            f"  of {source}  {number(figures['mean_acceptance_length'], '.3f')}"
            for source, figures in content["validation_by_source"].items()
            if figures
        ),
        f"best checkpoint  {best_name}",
        f"last checkpoint  {content['last_checkpoint'] or 'none'}",
        f"time  {duration(wall_s['total'])} in all, {duration(wall_s['attempt'])} in this attempt, "
        f"{content['checkpoints_s']:.1f} s in checkpoints",
    ]
    texts: list[RenderableType] = [Text(line) if isinstance(line, str) else line for line in lines]
    return Group("", Text(title, style="bold"), *texts)


def _validation_table(content: dict[str, Any], validation: dict[str, Any]) -> Table:
    kinds = ["loss", "bits", "label_accuracy", "agreement", "acceptance_rate"]
    heads = ["loss\nnats", f"loss\n{content['bits_unit']}", "top-1\nlabel", "agree\nwith main", "accepted\ncumulative"]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    table.add_column("\noffset", justify="right")
    shown = list(zip(kinds, heads, strict=True))[: None if content["num_offsets"] > 1 else 3]
    for _, head in shown:
        table.add_column(head, justify="right", no_wrap=True)
    for k in map(str, range(1, content["num_offsets"] + 1)):
        figures = ((kind, validation.get(kind, {}).get(k)) for kind, _ in shown)
        table.add_row(k, *(number(f) if kind in ("loss", "bits") else share(f) for kind, f in figures))
    return table
