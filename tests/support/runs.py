"""Real runs of the command line in a process of their own, whole or killed."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOISY_COLUMNS = ("tokens_per_s", "memory_gib")


def mtp(*arguments: str, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `mtp` to its end."""
    return subprocess.run(_command(arguments), cwd=cwd, env=_environment(), capture_output=True, text=True, **options)


def mtp_killed(*arguments: str, cwd: Path, metrics: Path, after_step: int, seed: int) -> int:
    """Run `mtp` and SIGKILL it at a random moment after it has logged a step; return the exit code."""
    process = subprocess.Popen(_command(arguments), cwd=cwd, env=_environment(), stdout=subprocess.PIPE, stderr=2)
    while process.poll() is None and last_step(metrics) < after_step:
        time.sleep(0.005)
    time.sleep(random.Random(seed).uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode


def last_step(metrics: Path) -> int:
    """Last step in a metrics.csv that may be missing or half a line."""
    lines = metrics.read_text().splitlines()[1:] if metrics.exists() else []
    steps = [line.split(",")[0] for line in lines]
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def figures(metrics: Path) -> list[dict[str, str]]:
    """Rows of a metrics.csv without what may differ from one machine or moment to the next."""
    with metrics.open() as file:
        return [{k: v for k, v in row.items() if k not in NOISY_COLUMNS} for row in csv.DictReader(file)]


def _command(arguments: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-c", "from mtp_lightning.cli.app import main; main()", *arguments]


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONWARNINGS": "default"}
