"""Count steps that leave the weights as they are: their loss or gradient is not finite, or they have no target."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from mtp_lightning.errors import NonFiniteError, RunFolderError
from mtp_lightning.files.untrusted import read_json
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe.schema.root import NonFiniteSection

EXPECTED = "every loss and every gradient must be finite"
HINT = (
    "The last good checkpoint is whole: lower optimizer.lr, lengthen optimizer.warmup_steps, or use "
    "run.precision=fp32; or allow more of health.nonfinite.skip_steps and rollbacks."
)

RECORDS = Path("logs/rollbacks.json")


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Rows that a run leaves out since it has gone back; counted as they would be consumed at that time."""

    step: int  # that was one too many
    checkpoint: int  # step of the checkpoint that the run went back to, 0 for its beginning
    first: int
    count: int


def read_rollbacks(run_folder: Path) -> list[Rollback]:
    """Read the rollbacks of a run, oldest first; call it on one rank only.

    Raises:
        RunFolderError: The file cannot be read.
    """
    path = run_folder / RECORDS
    try:
        return [Rollback(**record) for record in read_json(path)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        raise RunFolderError(
            "the record of a run's rollbacks must be readable",
            f"{path}: {error}",
            "Repair it: without it the run would train on rows that it must leave out",
        ) from None


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
