"""What a page shows of a run beside its curves: its state, recipe, starts, and the results that lie in its folder."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtp_lightning.errors import RunFolderError
from mtp_lightning.evaluation.run_page.curves import Curves, read_curves
from mtp_lightning.files.untrusted import OddFileError, read_json, read_object, reason_of
from mtp_lightning.launch.status import RECIPE, RunStatus, statuses
from mtp_lightning.launch.yaml_files import read_yaml
from mtp_lightning.recipe.schema.phases import FOLDER

MOST_POINTS = 180_000  # of all curves of a page
FEWEST, MOST = 40, 600  # of a curve
COLUMNS = 60  # that a run of four offsets draws, about
RESULTS = ("*.json", "*/results.json", "eval*/*.json", "eval*/*/*.json", "bench*/*.json")
MOST_FILES, MOST_BYTES, MOST_LEAVES = 50, 2**20, 200
LONGEST = 300  # of a value
NO_RESULT = ("summary.json",)
_NUMBER = re.compile(r"\d{1,9}")


@dataclass
class Run:
    """A run as a page shows it."""

    status: RunStatus
    recipe: dict[str, str]  # values as JSON by dotted path
    curves: Curves
    attempts: list[dict[str, str]]
    results: dict[str, dict[str, str]]  # figures as text by file and dotted path
    decoding: list[dict[str, Any]]  # rows of `mtp bench decode`
    faults: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.status.name


def find_runs(places: list[Path]) -> list[RunStatus]:
    """Find the runs in or beneath some folders, in the order of these.

    Raises:
        RunFolderError: There is none in one of them.
    """
    by_path: dict[Path, RunStatus] = {}
    for place in places:
        found = statuses([place])
        if not found:
            raise RunFolderError(
                "there must be a run in or beneath each folder that is given",
                f"none in {place}" if place.exists() else f"no folder {place}",
                "Give folders that mtp train or mtp sweep has made (run.dir)",
            )
        by_path |= {run.path.absolute(): run for run in found}
    return list(by_path.values())


def read_runs(found: list[RunStatus]) -> list[Run]:
    """Read what a page shows of runs; what cannot be read of one is among its faults."""
    most_points = max(FEWEST, min(MOST, MOST_POINTS // (COLUMNS * len(found))))
    return [_read(status, most_points) for status in found]


def _read(status: RunStatus, most_points: int) -> Run:
    folder, faults = status.path, list(status.faults)
    recipe = _try(folder / RECIPE, read_yaml, faults)
    files = {path: _try(path, _small_json, faults) for path in _result_files(folder, faults)}
    benches = [value for value in files.values() if _is_decoding(value)]
    curves = read_curves(_stages(folder), most_points)
    results = {
        str(path.relative_to(folder)): dict(_leaves(value))
        for path, value in files.items()
        if value is not None and not _is_decoding(value)
    }
    rows = [row for bench in benches for row in bench["figures"] if isinstance(row, dict)]
    rows = [{**row, "decoder": "ceiling"} if row.get("is_ceiling") else row for row in rows]
    return Run(
        status=status,
        recipe=dict(_leaves(recipe)) if isinstance(recipe, dict) else {},
        curves=curves,
        attempts=[_attempt(path) for path in _in_order(_glob(folder, "logs/attempt_*", faults))],
        results=results,
        decoding=rows,
        faults=list(dict.fromkeys([*faults, *curves.faults])),
    )


def _stages(folder: Path) -> list[Path]:
    """Folders of the phases that have begun, in their order; the run's own where it has none."""
    return _in_order(path.parent for path in _glob(folder, f"{FOLDER}/*/{RECIPE}", [])) or [folder]


def _in_order(paths: Iterable[Path]) -> list[Path]:
    numbers = {path: int(found[0]) for path in paths if (found := _NUMBER.search(path.name))}
    return sorted(numbers, key=lambda path: numbers[path])


def _glob(folder: Path, pattern: str, faults: list[str]) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError as error:
        faults.append(f"{folder}: {reason_of(error)}")
        return []


def _result_files(folder: Path, faults: list[str]) -> list[Path]:
    found = dict.fromkeys(path for pattern in RESULTS for path in _glob(folder, pattern, faults))
    return [path for path in found if path.name not in NO_RESULT and not path.name.startswith(".")][:MOST_FILES]


def _small_json(path: Path) -> Any:
    return read_json(path, MOST_BYTES)


def _try(path: Path, reader: Any, faults: list[str]) -> Any:
    try:
        return reader(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, OddFileError) as error:
        faults.append(f"{path.name}: {reason_of(error)}")
        return None


def _attempt(path: Path) -> dict[str, str]:
    """Say when and where a start of the run was; nothing of what cannot be read."""
    found = _try(path / "environment.json", read_object, []) or {}
    versions = found.get("packages")
    told = {name: found.get(name) for name in ("started_at", "host", "python", "git_revision")}
    told["torch"] = versions.get("torch") if isinstance(versions, dict) else None
    return {"attempt": path.name.removeprefix("attempt_")} | {
        name: value for name, value in told.items() if isinstance(value, str)
    }


def _is_decoding(value: Any) -> bool:
    return isinstance(value, dict) and value.get("benchmark") == "decode" and isinstance(value.get("figures"), list)


def _leaves(value: Any) -> Iterator[tuple[str, str]]:
    """Flatten a document into dotted paths, a list of plain values into one text; the first MOST_LEAVES of a file."""
    open_ones: list[tuple[str, Any]] = [("", value)]
    count = 0
    while open_ones and count < MOST_LEAVES:
        path, inner = open_ones.pop()
        if isinstance(inner, dict) and inner:
            open_ones += [(f"{path}.{key}".lstrip("."), each) for key, each in reversed(inner.items())]
        elif isinstance(inner, list) and any(isinstance(each, dict | list) for each in inner):
            open_ones += [(f"{path}[{place}]", each) for place, each in reversed([*enumerate(inner, 1)])]
        else:
            count += 1
            yield path, as_text(inner)
    if open_ones:
        yield "…", f"the rest is left out, {len(open_ones):,} or more values"


def as_text(value: Any) -> str:
    """Write a plain value, cut where it is long.

    >>> as_text(1234.5678), as_text(0.123456789), as_text([1, None])
    ('1,234.57', '0.123457', '[1, null]')
    """
    if isinstance(value, float):
        return f"{value:,.2f}" if 1000 <= abs(value) < 1e15 else f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"
