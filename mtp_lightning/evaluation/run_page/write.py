"""The page itself: one file with style, scripts and data in it, and a policy that forbids it the network."""

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from mtp_lightning import __version__
from mtp_lightning.errors import RunFolderError, refusal_of, remedy_of, visible
from mtp_lightning.evaluation.run_page.panels import data_of, sections_of
from mtp_lightning.evaluation.run_page.runs import Run, as_text
from mtp_lightning.files.durable import write_whole

SCRIPTS = ("d3.min.js", "plot.umd.min.js", "page.js")
DECODE_COLUMNS = {
    "batch": "batch",
    "decoder": "decoder",
    "drafts": "draft_length",
    "tokens/s": "tokens_per_s",
    "speed-up": "speedup",
    "acceptance length": "mean_acceptance_length",
    "efficiency": "efficiency",
    "same text": "same_texts",
}
ATTEMPT_COLUMNS = {
    "start": "attempt",
    "began": "started_at",
    "machine": "host",
    "torch": "torch",
    "Python": "python",
    "revision": "git_revision",
}
_NUMBER = re.compile(r"(\d+)")
NO_DRAFTS = "Not asked for: mtp report RUN... --prompt TEXT, or --sample-text FILE, shows those of each last checkpoint"


def write_page(runs: list[Run], path: Path, **parts: Any) -> None:
    """Write runs onto one page; an old file is replaced at once, and stays where the new one cannot be written.

    Args:
        runs: what `read_runs` has read.
        path: where to write it.
        parts: as of `page_of`.

    Raises:
        RunFolderError: It cannot be written there.
    """
    content = page_of(runs, **parts).encode()
    try:
        write_whole(path, content)
    except OSError as error:
        raise RunFolderError(
            "the file for the page must be writable", refusal_of(error, path), remedy_of(error, "--html")
        ) from error


def page_of(runs: list[Run], *, drafts: Sequence[dict[str, Any]] = (), comparison: dict[str, Any] | None = None) -> str:
    """Return the page as HTML; all texts of runs are escaped.

    Args:
        runs: what `read_runs` has read.
        drafts: what `drafts_of` has found of some of them.
        comparison: `tables` (columns and rows of text) and `notes` of recipes over their seeds.
    """
    sections = sections_of(runs)
    for number, panel in enumerate(panel for section in sections for panel in section.panels):
        panel["number"] = number
    scripts = [_part(name) for name in SCRIPTS]
    recipes = _matrix([run.recipe for run in runs])
    template = _environment().from_string(_part("page.html.j2"))
    return template.render(
        title=runs[0].name if len(runs) == 1 else f"{len(runs)} runs",
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        style=Markup(_part("page.css")),
        scripts=[Markup(script) for script in scripts],
        script_hashes=Markup(" ".join(map(_hash, scripts))),
        runs=runs,
        remarks=list(_remarks(runs)),
        sections=sections,
        last_figures=_last_figures(runs),
        drafts=drafts,
        comparison=comparison,
        no_drafts=NO_DRAFTS,
        decode_columns=DECODE_COLUMNS,
        attempt_columns=ATTEMPT_COLUMNS,
        results=_results(runs),
        recipes=recipes,
        differing={path: row for path, row in recipes.items() if len(set(row)) > 1 and path != "run.dir"},
        data=data_of(runs, sections),
    )


def _environment() -> Environment:
    environment = Environment(autoescape=True, finalize=_finalize, trim_blocks=True)
    environment.filters |= {"count": _count, "figure": _figure}
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment


def _finalize(value: Any) -> Any:
    """Write out characters that would turn or hide what is beside them."""
    return value if isinstance(value, Markup) else visible(str(value))


def _part(name: str) -> str:
    return files("mtp_lightning.evaluation.run_page").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _figure(value: Any) -> str:
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.4g}"
    return "-" if value is None else as_text(value)


def _matrix(columns: Sequence[dict[str, str]]) -> dict[str, list[str | None]]:
    """Put mappings side by side: a row for every key of any."""
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name) for column in columns] for name in names}


def _last_figures(runs: list[Run]) -> dict[str, list[str | None]]:
    table = _matrix([{name: f"{value:.5g}" for name, value in run.curves.last.items()} for run in runs])
    return {name: table[name] for name in sorted(table, key=_in_order)}


def _in_order(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in _NUMBER.split(name)]


def _results(runs: list[Run]) -> dict[str, dict[str, list[str | None]]]:
    names = dict.fromkeys(name for run in runs for name in run.results)
    return {name: _matrix([run.results.get(name, {}) for run in runs]) for name in names}


def _remarks(runs: list[Run]) -> Iterable[str]:
    for number, run in enumerate(runs, 1):
        if not run.curves.num_rows:
            yield f"Run {number}: no figures yet."
        for name, steps in run.curves.holes.items():
            rows = f"{len(steps):,} rows, the first at step {steps[0]:,}"
            yield f"Run {number}: {name} is not a number that can be drawn in {rows}."
        for fault in run.faults:
            yield f"Run {number}: {fault}"
