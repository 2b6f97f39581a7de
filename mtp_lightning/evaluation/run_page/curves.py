"""Columns of metrics.csv as curves of few points, in which every extreme is kept."""

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mtp_lightning.files.untrusted import OddFileError, open_regular, reason_of
from mtp_lightning.launch.status import MOST

Point = tuple[int, float]
DRAWN = re.compile(
    r"(train|val)/(loss_\d{1,4}|acceptance_rate_\d{1,4}|mean_acceptance_length)|val/sampled_acceptance_length"
    r"|val/mean_acceptance_length@.+|drift/(nll_change|nll_change_low|nll_change_high|kl|flips)"
    r"|lr|tokens_per_s|grad_norm/all"
)
"""Names of columns that the page draws."""
LARGEST = 1e30  # that is drawn; what is beyond, or no number, is a hole
MOST_HOLES = 40  # of a curve that are marked
SLACK = 16  # times as many points are held while a file is read


@dataclass
class Curves:
    """The drawn columns of a run, over its steps; those of a run in phases are counted through."""

    points: dict[str, list[Point]] = field(default_factory=dict)
    holes: dict[str, list[int]] = field(default_factory=dict)  # steps of figures that are not drawn
    phase_ends: list[int] = field(default_factory=list)
    num_rows: int = 0
    last_step: int = 0
    last: dict[str, float] = field(default_factory=dict)  # last finite figure of every drawn column
    faults: list[str] = field(default_factory=list)


def read_curves(folders: list[Path], most_points: int) -> Curves:
    """Read the metrics of a run, or of its phases one after the other; what cannot be read is noted.

    Args:
        folders: each may hold a metrics.csv.
        most_points: of a curve, about.
    """
    curves = Curves()
    for folder in folders:
        begin = curves.last_step
        path = folder / "metrics.csv"
        try:
            for step, figures in _rows(path):
                _add(curves, begin + step, figures, SLACK * most_points)
        except FileNotFoundError:
            curves.faults.append(f"{folder.name}: no metrics yet")
        except (OSError, OddFileError, csv.Error) as error:
            curves.faults.append(f"{path}: {reason_of(error)}")
        if folder is not folders[-1] and curves.last_step > begin:
            curves.phase_ends.append(curves.last_step)
    curves.points = {name: thin(points, most_points) for name, points in curves.points.items()}
    return curves


def _add(curves: Curves, step: int, figures: dict[str, float], most_held: int) -> None:
    curves.num_rows += 1
    curves.last_step = max(curves.last_step, step)
    for name, value in figures.items():
        if not abs(value) <= LARGEST:
            curves.holes.setdefault(name, []).append(step)
            continue
        curves.last[name] = value
        points = curves.points.setdefault(name, [])
        points.append((step, value))
        if len(points) > most_held:
            curves.points[name] = thin(points, most_held // 2)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield step and drawn figures of every row that is whole; a kill may have cut the last one short."""
    with open_regular(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="")
        reader = csv.reader(line for line in text if line.endswith("\n"))
        header = next(reader, [])
        drawn = [(place, name) for place, name in enumerate(header) if DRAWN.fullmatch(name)]
        at = header.index("step") if "step" in header else None
        for cells in reader:
            step = None if at is None or len(cells) != len(header) else _number(cells[at])
            if step is not None and 0 <= step <= MOST:
                numbers = ((name, _number(cells[place])) for place, name in drawn if cells[place])
                yield int(step), {name: number for name, number in numbers if number is not None}


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def thin(points: list[Point], most: int) -> list[Point]:
    """Keep the first and last point, and the lowest and highest of every stretch of steps; about `most` in all.

    >>> thin([(step, float(step == 70)) for step in range(1000)], 8)
    [(0, 0.0), (70, 1.0), (250, 0.0), (500, 0.0), (750, 0.0), (999, 0.0)]
    """
    if len(points) <= most:
        return points
    begin, width = points[0][0], (points[-1][0] - points[0][0] + 1) / max(1, most // 2)
    stretches: dict[int, list[int]] = {}  # places of the lowest and highest
    for place, (step, value) in enumerate(points):
        ends = stretches.setdefault(int((step - begin) // width), [place, place])
        if value < points[ends[0]][1]:
            ends[0] = place
        if value > points[ends[1]][1]:
            ends[1] = place
    kept = {0, len(points) - 1}.union(*stretches.values())
    return [points[place] for place in sorted(kept)]
