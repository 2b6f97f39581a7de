"""Losses and gradients that are not finite: steps without effect, then back to the last good checkpoint."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from mtp_lightning.checkpoint.format.commit import read_pointer
from mtp_lightning.checkpoint.format.layout import Checkpoint, newest_complete
from mtp_lightning.checkpoint.format.state_folder import read_state
from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.errors import NonFiniteError, RunFolderError
from mtp_lightning.files.durable import replace_durably
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe.schema.root import NonFiniteSection

EXPECTED = "every loss and every gradient must be finite"
HINT = (
    "The last good checkpoint is whole: lower optimizer.lr, lengthen optimizer.warmup_steps, or use "
    "run.precision=fp32; or allow more of health.nonfinite.skip_steps and rollbacks."
)
RECORDS = Path("logs/rollbacks.json")


@final
class NonFiniteStreak(NonFiniteError):
    """More steps in a row than may be skipped were not finite; all ranks raise it at the same step.

    Attributes:
        step: number of the last of these steps.
        first_row: rows consumed before the first of them.
        end_row: rows consumed after the last.
    """

    def __init__(self, found: str, step: int, first_row: int, end_row: int) -> None:
        self.step, self.first_row, self.end_row = step, first_row, end_row
        super().__init__(EXPECTED, f"{found} that is not, at step {step}", HINT)

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross process borders as the error that users see."""
        return NonFiniteError, (self.expected, self.found, self.hint)


@final
class SkippedSteps:
    """Counts the steps of a run that left the weights as they were.

    Attributes:
        total: all of them, those of fp16's search for its loss scale included.
        empty: those that had nothing to learn, since this start.
        in_row: those since the last finite step.
    """

    def __init__(self, section: NonFiniteSection) -> None:
        self.total = self.in_row = self.empty = 0
        self._most_in_row = section.skip_steps
        self._first_row = 0

    def add(self, found: str, step: int, rows: range) -> None:
        """Count step number `step` with its rows of the run, unless it is one too many.

        Raises:
            NonFiniteStreak: It is.
        """
        if not self.in_row:
            self._first_row = rows.start
        if self.in_row == self._most_in_row:
            raise NonFiniteStreak(found, step, self._first_row, rows.stop)
        self.in_row += 1
        self.total += 1
        if Ranks().is_first:
            print(
                f"Step {step} skipped: {found} is not finite, in rows {rows.start:,} to {rows.stop - 1:,} of the run "
                f"({self.in_row} in a row, {self._most_in_row} may be)",
                flush=True,
            )

    def pass_over(self, step: int, rows: range) -> None:
        """Count a step whose rows hold nothing to learn; the first, second, fourth, ... of them is told."""
        self.total += 1
        self.empty += 1
        if self.empty & (self.empty - 1) == 0 and Ranks().is_first:
            print(
                f"Step {step} skipped: no token to learn in rows {rows.start:,} to {rows.stop - 1:,} of the run "
                f"({self.empty} such steps since the start)",
                flush=True,
            )

    def end(self) -> None:
        """Count a finite step."""
        self.in_row = 0

    def state(self) -> dict[str, int]:
        """Return the counts, for a checkpoint."""
        return {"total": self.total, "in_row": self.in_row, "first_row": self._first_row}

    def load(self, state: dict[str, int]) -> None:
        """Go on counting from a checkpoint; those from before there were counts have none."""
        self.total, self.in_row = state.get("total", 0), state.get("in_row", 0)
        self._first_row = state.get("first_row", 0)


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Rows that a run leaves out since it has gone back; counted as they would be consumed at that time."""

    step: int  # that was one too many
    checkpoint: int  # step of the checkpoint that the run went back to, 0 for its beginning
    first: int
    count: int


def read_rollbacks(run_folder: Path) -> list[Rollback]:
    """Read what a run has gone back for, oldest first; call it on one rank only.

    Raises:
        RunFolderError: The file cannot be read.
    """
    path = run_folder / RECORDS
    try:
        return [Rollback(**record) for record in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise RunFolderError(
            "the record of a run's rollbacks must be readable",
            f"{path}: {error}",
            "Repair it: without it the run would train on rows that it must leave out",
        ) from None


def roll_back(run_folder: Path, section: NonFiniteSection, streak: NonFiniteStreak) -> Checkpoint | None:
    """Note durably which rows the run leaves out from now on; return the checkpoint to go on from, if there is one.

    These are the rows of the steps that were not finite. A second time at the same checkpoint they are not the reason:
    then that checkpoint is set aside for the one before, and all rows since are left out. All ranks call it.

    Raises:
        NonFiniteError: The run has gone back as often as it may.
    """
    ranks = Ranks()
    found: Checkpoint | None = None
    with ranks.agreeing():
        if ranks.is_first:
            records = read_rollbacks(run_folder)
            if len(records) >= section.rollbacks:
                raise NonFiniteError(
                    EXPECTED, f"{streak.found}, after {len(records)} of {section.rollbacks} rollbacks", HINT
                )
            found, record = _chosen(run_folder, records, streak)
            content = json.dumps([asdict(own) for own in (*records, record)], indent=1)
            replace_durably(run_folder / RECORDS, content.encode() + b"\n")
            print(
                f"Rolling back to step {record.checkpoint} ({len(records) + 1} of {section.rollbacks} times): "
                f"{streak.found}. Rows {record.first:,} to {record.first + record.count - 1:,} of the run are left out",
                flush=True,
            )
    chosen: Checkpoint | None = ranks.broadcast(found)
    return chosen


def _chosen(
    run_folder: Path, records: Sequence[Rollback], streak: NonFiniteStreak
) -> tuple[Checkpoint | None, Rollback]:
    """Choose where to go on, and what to leave out."""
    folder = run_folder / "checkpoints"
    newest = newest_complete(folder)
    is_again = bool(records) and records[-1].checkpoint == (newest.step if newest else 0)
    if is_again and newest is not None:
        _set_aside(newest, f".nonfinite-{len(records)}")
        newest = newest_complete(folder)
    consumed = _rows_consumed(newest) if newest else 0
    first = consumed if is_again else max(consumed, streak.first_row)
    step = newest.step if newest else 0
    return newest, Rollback(step=streak.step, checkpoint=step, first=first, count=streak.end_row - first)


def _set_aside(checkpoint: Checkpoint, ending: str) -> None:
    """Rename a checkpoint that no run can go on from, and let no pointer name it."""
    folder, name = checkpoint.path.parent, checkpoint.path.name
    for kind in ("last", "best"):
        if read_pointer(folder, kind) == checkpoint.path:
            (folder / kind).unlink()
    checkpoint.path.rename(folder / (name + ending))
    print(f"Nothing finite comes after {name}: it is now called {name}{ending}", flush=True)


def _rows_consumed(checkpoint: Checkpoint) -> int:
    return int(read_state(checkpoint.path)[MtpDataModule.__qualname__]["rows_consumed"])
