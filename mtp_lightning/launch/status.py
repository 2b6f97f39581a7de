"""What a run folder says about its run, read without torch and without disturbing the run."""

import csv
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

from pydantic import ValidationError

from mtp_lightning.files.lock import FileId, file_id, locked_files
from mtp_lightning.files.untrusted import OddFileError, described, open_regular, read_object, reason_of
from mtp_lightning.launch.scheduler import job_states
from mtp_lightning.launch.yaml_files import read_yaml
from mtp_lightning.planner.flops import tokens_after
from mtp_lightning.recipe.schema.phases import FOLDER
from mtp_lightning.recipe.schema.root import Recipe

RECIPE = "recipe.yaml"
DEEPEST = 4
TAIL_BYTES = 65_536
MOST = 10**15  # steps, tokens
MOST_GROWTHS = 10_000  # sizes of a ramp's steps
_STEP = re.compile(r"step-([0-9]{1,15})")
_ATTEMPT = re.compile(r"attempt_[0-9]+")
_PHASE = re.compile(r"([0-9]{1,15})(?![0-9])")
_JOB = re.compile(r"[0-9]{1,15}(_[0-9]{1,15})?")
ABSENT: Any = object()
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run at a glance; None where nothing is known yet. Of a run in phases, figures are those of the present one."""

    path: Path
    name: str
    job: str | None
    state: str  # of its job, where Slurm knows one; else finished, running or stopped
    is_finished: bool
    step: int
    steps: int | None
    tokens: int | None
    remaining_tokens: int | None
    tokens_per_s: float | None
    loss: float | None  # of the main head: of the last validation, or else of training
    mean_acceptance_length: float | None
    checkpoint: int | None  # step of the newest
    restarts: int
    faults: tuple[str, ...] = ()  # what of the folder could not be read, in words

    @property
    def remaining_s(self) -> float | None:
        """Time to the end at the last speed; None when it does not run."""
        if self.remaining_tokens is None or not self.tokens_per_s or self.state not in RUNNING:
            return None
        remaining_s = self.remaining_tokens / self.tokens_per_s
        return remaining_s if math.isfinite(remaining_s) else None


RUNNING = ("running", "RUNNING", "COMPLETING")


@final
class _Reading:
    """The files of a run; what cannot be read is noted, and counts as absent."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.faults: dict[str, None] = {}  # in order, each once

    def note(self, path: Path, found: str) -> None:
        """Note what is odd about a file."""
        self.faults[f"{path.relative_to(self.run)}: {found}"] = None

    def read(self, path: Path, reader: Callable[[Path], Value], default: Value) -> Value:
        """Read a file, if it is there."""
        try:
            return reader(path)
        except (FileNotFoundError, NotADirectoryError):
            return default
        except (OSError, OddFileError) as error:
            self.note(path, reason_of(error))
            return default

    def json(self, path: Path) -> dict[str, Any]:
        """Read a JSON object."""
        return self.read(path, read_object, {})


def statuses(folders: Sequence[Path]) -> list[RunStatus]:
    """Read all runs in or beneath some folders, in the order of their paths; Slurm is asked once for all jobs."""
    runs = {run: _Reading(run) for run in sorted({run for folder in folders for run in find_runs(folder)})}
    jobs = {run: _job_of(reading) for run, reading in runs.items()}
    states = job_states({job for job in jobs.values() if job})
    locked = locked_files()
    return [
        _status_of(reading, jobs[run], states.get(jobs[run] or ""), is_locked=_is_locked(run, locked))
        for run, reading in runs.items()
    ]


def find_runs(folder: Path, depth: int = DEEPEST) -> Iterator[Path]:
    """Yield run folders: those that hold logs of an attempt or of a submission of their own.

    A folder that cannot be looked into is yielded, too: it may be one.
    """
    try:
        is_run = _is_run(folder)
        inner = [] if is_run or not depth else _folders_in(folder)
    except OSError:
        is_run, inner = True, []
    if is_run:
        yield folder
    for path in inner:
        yield from find_runs(path, depth - 1)


def _is_run(folder: Path) -> bool:
    logs = folder / "logs"
    return (logs / "job.json").is_file() or any(logs.glob("attempt_*"))


def _folders_in(folder: Path) -> list[Path]:
    inner = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in inner if path.is_dir() and not path.is_symlink() and not path.name.startswith(".")]


def _status_of(reading: _Reading, job: str | None, job_state: str | None, *, is_locked: bool) -> RunStatus:
    try:
        next(reading.run.iterdir(), None)
        return _opened(reading, job, job_state, is_locked=is_locked)
    except OSError as error:
        return _closed(reading.run, job_state, reason_of(error))


def _opened(reading: _Reading, job: str | None, job_state: str | None, *, is_locked: bool) -> RunStatus:
    run, current = reading.run, current_phase(reading.run)
    recipe, summary = _recipe_of(reading, current), reading.json(run / "summary.json")
    row: dict[str, float] = reading.read(current / "metrics.csv", _last_figures, {})
    saved = [int(found[1]) for path in current.glob("checkpoints/step-*") if (found := _STEP.fullmatch(path.name))]
    step, steps = _count(row.get("step")) or 0, _steps_of(reading, recipe)
    has_all = bool(steps) and max(saved, default=0) >= (steps or 0)
    has_ended = has_all or (bool(reading.json(current / "summary.json").get("ended_early")) and not is_locked)
    is_finished = bool(summary.get("is_finished")) and has_ended
    return RunStatus(
        path=run,
        name=_name_of(reading, recipe),
        job=job,
        state=job_state or ("finished" if is_finished else "running" if is_locked else "stopped"),
        is_finished=is_finished,
        step=step,
        steps=steps,
        tokens=_count(row.get("tokens")),
        remaining_tokens=_remaining_tokens(recipe, step),
        tokens_per_s=row.get("tokens_per_s"),
        loss=row.get("val/loss_1", row.get("train/loss_1")),
        mean_acceptance_length=row.get("val/mean_acceptance_length", row.get("train/mean_acceptance_length")),
        checkpoint=max(saved, default=None),
        restarts=max(0, sum(_ATTEMPT.fullmatch(path.name) is not None for path in run.glob("logs/attempt_*")) - 1),
        faults=tuple(reading.faults),
    )


def _closed(run: Path, job_state: str | None, found: str) -> RunStatus:
    return RunStatus(
        path=run,
        name="?",
        job=None,
        state=job_state or "unreadable",
        is_finished=False,
        step=0,
        steps=None,
        tokens=None,
        remaining_tokens=None,
        tokens_per_s=None,
        loss=None,
        mean_acceptance_length=None,
        checkpoint=None,
        restarts=0,
        faults=(f"cannot be looked into: {found}",),
    )


def _name_of(reading: _Reading, recipe: dict[str, Any]) -> str:
    name = recipe.get("name", "?")
    if isinstance(name, str):
        return name
    reading.note(reading.run / RECIPE, f"name is {described(name)}, not text")
    return "?"


def _steps_of(reading: _Reading, recipe: dict[str, Any]) -> int | None:
    section = recipe.get("run", {})
    if not isinstance(section, dict):
        reading.note(reading.run / RECIPE, f"run is {described(section)}, not a section")
        return None
    steps = section.get("steps")
    if steps is None or (type(steps) is int and 0 <= steps <= MOST):
        return steps
    reading.note(reading.run / RECIPE, f"run.steps is {described(steps)}, not a number of steps")
    return None


def _remaining_tokens(content: dict[str, Any], step: int) -> int | None:
    """Count the tokens from a step to the end; a ramp's steps differ in size."""
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError:  # of another version
        return None
    ramp = recipe.batch.ramp
    if recipe.run.steps > MOST or (ramp and recipe.batch.global_batch_size > MOST_GROWTHS * ramp.from_batch_size):
        return None  # counting would take long
    return tokens_after(recipe, recipe.run.steps) - tokens_after(recipe, step)


def current_phase(run: Path) -> Path:
    """Return the last phase that has begun, or the run itself where it has none."""
    begun = [path.parent for path in run.glob(f"{FOLDER}/*/{RECIPE}")]
    numbered = {int(found[1]): phase for phase in begun if (found := _PHASE.match(phase.name))}
    return numbered[max(numbered)] if numbered else run


def _job_of(reading: _Reading) -> str | None:
    """Return the id of a run's job; it becomes an argument of squeue."""
    path = reading.run / "logs/job.json"
    job = reading.json(path).get("job")
    if job is None or (isinstance(job, str) and _JOB.fullmatch(job)):
        return job
    reading.note(path, f"job is {described(job)}, not the number of a job")
    return None


def _recipe_of(reading: _Reading, run: Path) -> dict[str, Any]:
    submissions = sorted(run.glob(f"logs/submit_*/{RECIPE}"), key=_changed_at)
    for path in (run / RECIPE, *reversed(submissions)):
        content = reading.read(path, read_yaml, ABSENT)
        if isinstance(content, dict):
            return content
        if content is not ABSENT:
            reading.note(path, f"{described(content)} in place of sections")
    return {}


def _changed_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _last_figures(path: Path) -> dict[str, float]:
    """Return the last figure of every column; from the end of the file only, so that its length costs nothing."""
    with open_regular(path) as file:
        header = file.readline(TAIL_BYTES)
        file.seek(max(len(header), os.fstat(file.fileno()).st_size - TAIL_BYTES))
        tail = file.read(TAIL_BYTES)
    names = next(csv.reader([header.decode(errors="replace")]), [])  # those of sources may hold commas
    figures: dict[str, float] = {}
    for line in tail.decode(errors="replace").splitlines(keepends=True):
        cells = line.rstrip("\n").split(",")
        if line.endswith("\n") and len(cells) == len(names):
            figures |= {
                name: number for name, cell in zip(names, cells, strict=True) if (number := _number(cell)) is not None
            }
    return figures


def _count(number: float | None) -> int | None:
    return int(number) if number is not None and 0 <= number <= MOST else None


def _number(cell: str) -> float | None:
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _is_locked(run: Path, locked: Collection[FileId]) -> bool:
    try:
        return file_id((run / ".lock").stat()) in locked
    except OSError:
        return False
