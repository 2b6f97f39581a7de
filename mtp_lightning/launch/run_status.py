"""What a run folder says about its run, read without torch and without disturbing the run."""

import csv
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mtp_lightning.launch.scheduler import job_states
from mtp_lightning.planner.flops import tokens_after
from mtp_lightning.recipe.phase_sections import FOLDER
from mtp_lightning.recipe.sections import Recipe
from mtp_lightning.recipe.yaml12 import RecipeYamlLoader

DEEPEST = 4
TAIL_BYTES = 65_536
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run at a glance; None where nothing is known yet. Of a run in phases, figures are those of the present one."""

    path: Path
    name: str
    job: str | None
    state: str
    step: int
    steps: int | None
    tokens: int | None
    remaining_tokens: int | None
    tokens_per_s: float | None
    loss: float | None  # of the main head: of the last validation, or else of training
    accepted_length: float | None
    checkpoint: int | None  # step of the newest
    restarts: int

    @property
    def remaining_s(self) -> float | None:
        """Time to the end at the last speed; None when it does not run."""
        if self.remaining_tokens is None or not self.tokens_per_s or self.state not in RUNNING:
            return None
        return self.remaining_tokens / self.tokens_per_s


RUNNING = ("running", "RUNNING", "COMPLETING")


def statuses(folders: Sequence[Path]) -> list[RunStatus]:
    """Read all runs in or beneath some folders, in the order of their paths; Slurm is asked once for all jobs."""
    runs = sorted({run for folder in folders for run in find_runs(folder)})
    jobs = {run: _job_of(run) for run in runs}
    states = job_states({job for job in jobs.values() if job})
    locked = _locked_files()
    return [_status_of(run, jobs[run], states.get(jobs[run] or ""), is_locked=_is_locked(run, locked)) for run in runs]


def find_runs(folder: Path, depth: int = DEEPEST) -> Iterator[Path]:
    """Yield run folders: those that hold logs of an attempt or of a submission of their own."""
    logs = folder / "logs"
    if (logs / "job.json").is_file() or any(logs.glob("attempt_*")):
        yield folder
    elif depth and folder.is_dir():
        for inner in sorted(folder.iterdir()):
            if inner.is_dir() and not inner.is_symlink() and not inner.name.startswith("."):
                yield from find_runs(inner, depth - 1)


def _status_of(run: Path, job: str | None, job_state: str | None, *, is_locked: bool) -> RunStatus:
    current = _current_phase(run)
    recipe, row = _recipe_of(current), _last_figures(current / "metrics.csv")
    summary = _json(run / "summary.json")
    saved = [int(found[1]) for path in current.glob("checkpoints/step-*") if (found := _STEP.fullmatch(path.name))]
    step, steps = int(row.get("step", 0)), recipe.get("run", {}).get("steps")
    has_all = bool(steps) and max(saved, default=0) >= steps
    is_finished = bool(summary.get("is_finished")) and (has_all or (_ended_early(current) and not is_locked))
    return RunStatus(
        path=run,
        name=str(recipe.get("name", "?")),
        job=job,
        state=job_state or ("finished" if is_finished else "running" if is_locked else "stopped"),
        step=step,
        steps=steps,
        tokens=int(row["tokens"]) if "tokens" in row else None,
        remaining_tokens=_remaining_tokens(recipe, step),
        tokens_per_s=row.get("tokens_per_s"),
        loss=row.get("val/loss_1", row.get("train/loss_1")),
        accepted_length=row.get("val/accepted_length", row.get("train/accepted_length")),
        checkpoint=max(saved, default=None),
        restarts=max(0, len(list(run.glob("logs/attempt_*"))) - 1),
    )


def _remaining_tokens(content: dict[str, Any], step: int) -> int | None:
    """Count the tokens from a step to the end; a ramp's steps differ in size."""
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError:  # of another version
        return None
    return tokens_after(recipe, recipe.run.steps) - tokens_after(recipe, step)


def _ended_early(run: Path) -> bool:
    return bool(_json(run / "summary.json").get("ended_early"))


def _current_phase(run: Path) -> Path:
    """Return the last phase that has begun, or the run itself where it has none."""
    begun = [path.parent for path in run.glob(f"{FOLDER}/*/recipe.yaml")]
    return max(begun, key=lambda phase: int(phase.name.partition("-")[0]), default=run)


def _job_of(run: Path) -> str | None:
    job = _json(run / "logs/job.json").get("job")
    return job if isinstance(job, str) else None


def _recipe_of(run: Path) -> dict[str, Any]:
    submissions = sorted(run.glob("logs/submit_*/recipe.yaml"), key=lambda path: path.stat().st_mtime)
    for path in (run / "recipe.yaml", *reversed(submissions)):
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), Loader=RecipeYamlLoader)
        except (OSError, yaml.YAMLError):
            continue
        if isinstance(content, dict):
            return content
    return {}


def _last_figures(path: Path) -> dict[str, float]:
    """Return the last figure of every column; from the end of the file only, so that its length costs nothing."""
    try:
        with path.open("rb") as file:
            header = file.readline()
            file.seek(max(len(header), path.stat().st_size - TAIL_BYTES))
            tail = file.read()
    except OSError:
        return {}
    names = next(csv.reader([header.decode(errors="replace")]), [])
    figures: dict[str, float] = {}
    for line in tail.decode(errors="replace").splitlines(keepends=True):
        cells = line.rstrip("\n").split(",")
        if line.endswith("\n") and len(cells) == len(names):
            figures |= {
                name: number for name, cell in zip(names, cells, strict=True) if (number := _number(cell)) is not None
            }
    return figures


def _number(cell: str) -> float | None:
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _locked_files() -> set[tuple[int, int, int]]:
    """List the files that processes of this machine hold locks on, as (major, minor, inode)."""
    try:
        lines = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return set()
    found = (re.search(r" ([0-9a-f]+):([0-9a-f]+):(\d+) ", line) for line in lines if "FLOCK" in line)
    return {(int(match[1], 16), int(match[2], 16), int(match[3])) for match in found if match}


def _is_locked(run: Path, locked: set[tuple[int, int, int]]) -> bool:
    try:
        stat = (run / ".lock").stat()
    except OSError:
        return False
    return (os.major(stat.st_dev), os.minor(stat.st_dev), stat.st_ino) in locked
