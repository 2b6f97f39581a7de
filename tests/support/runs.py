"""Real runs of the command line in a process of their own, whole or killed."""

import csv
import os
import random
import subprocess
import time
from pathlib import Path

from tests.support import warm

ROOT = Path(__file__).parents[2]
NOISY_COLUMNS = ("tokens_per_s", "mfu", "memory_gib", "time/")


def mtp(*arguments: str, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `mtp` to its end."""
    return warm.run(*arguments, cwd=cwd, environment=_environment(), **{"warm_ranks": True} | options)


def mtp_killed(*arguments: str, cwd: Path, metrics: Path, after_step: int, seed: int) -> int:
    """Run `mtp` and SIGKILL it at a random moment after it has logged a step; return the exit code."""
    process = warm.start(*arguments, cwd=cwd, environment=_environment(), warm_ranks=True)
    while process.poll() is None and last_step(metrics) < after_step:
        time.sleep(0.005)
    time.sleep(random.Random(seed).uniform(0, 0.2))
    process.kill()
    process.communicate()
    return process.wait()


def last_step(metrics: Path) -> int:
    """Last step in a metrics.csv that may be missing or half a line."""
    lines = metrics.read_text().splitlines()[1:] if metrics.exists() else []
    steps = [line.split(",")[0] for line in lines]
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def figures(metrics: Path) -> list[dict[str, str]]:
    """Rows of a metrics.csv without what may differ from one machine or moment to the next."""
    with metrics.open() as file:
        return [{k: v for k, v in row.items() if not k.startswith(NOISY_COLUMNS)} for row in csv.DictReader(file)]


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONWARNINGS": "default"}
