"""Sweeps: several values of some fields, and a run for each combination."""

import itertools
import re
from collections.abc import Sequence

from mtp_lightning.errors import LaunchError

MOST_RUNS = 1000


def sweep_points(sweeps: Sequence[str]) -> list[list[str]]:
    """Return the overrides of every run of a sweep, in order; without sweeps one run without any.

    >>> sweep_points(["optimizer.lr=1e-4,3e-4", "optimizer.betas=[0.9,0.95]"])
    [['optimizer.lr=1e-4', 'optimizer.betas=[0.9,0.95]'], ['optimizer.lr=3e-4', 'optimizer.betas=[0.9,0.95]']]

    Raises:
        LaunchError: A sweep is not KEY=V1,V2, repeats a value, or there are too many runs.
    """
    choices = [_choices(sweep) for sweep in sweeps]
    points = [list(point) for point in itertools.product(*choices)]
    if len(points) > MOST_RUNS:
        raise LaunchError(f"a sweep has at most {MOST_RUNS:,} runs", f"{len(points):,}", "Sweep fewer values at once")
    return points


def folder_name(point: Sequence[str]) -> str:
    """Return a name for a run's folder.

    >>> folder_name(["optimizer.lr=1e-4", "data.corpus=[a/b, c]"])
    'optimizer.lr=1e-4,data.corpus=_a_b__c_'
    """
    return ",".join(re.sub(r"[^\w.=+-]", "_", override) for override in point)


def _choices(sweep: str) -> list[str]:
    key, equals, text = sweep.partition("=")
    values = [value.strip() for value in _split(text)]
    if not equals or not key.strip() or not all(values):
        raise LaunchError(
            "--sweep must be written KEY=VALUE,VALUE,…", repr(sweep), "Write --sweep optimizer.lr=1e-4,3e-4"
        )
    if len(set(values)) < len(values):
        raise LaunchError("--sweep must not repeat a value", sweep, "Leave the second one out")
    return [f"{key.strip()}={value}" for value in values]


def _split(text: str) -> list[str]:
    """Split at commas outside of brackets and braces."""
    parts, depth = [""], 0
    for character in text:
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
