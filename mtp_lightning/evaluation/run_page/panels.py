"""Which charts a page has, and which columns of which runs each of them shows."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from mtp_lightning.errors import visible
from mtp_lightning.evaluation.run_page.curves import MOST_HOLES
from mtp_lightning.evaluation.run_page.runs import Run

MOST_PANELS = 32  # of offsets or sources
_OFFSET = re.compile(r"(?:train|val)/(loss|acceptance_rate)_(\d+)")


class Section(NamedTuple):
    """A heading with charts; without any, what is said in their place."""

    title: str
    note: str
    panels: list[dict[str, Any]]
    missing: str


def sections_of(runs: list[Run]) -> list[Section]:
    """Lay out charts: for one run a line per offset or source, for several a chart of each with a line per run."""
    offsets = sorted({int(found[2]) for name in _names(runs) if (found := _OFFSET.fullmatch(name))})[:MOST_PANELS]
    sources = sorted({name.partition("@")[2] for name in _names(runs) if "@" in name})[:MOST_PANELS]
    losses = {f"offset {k}": (f"train/loss_{k}", f"val/loss_{k}") for k in offsets}
    kept = {f"offset {k}": (f"train/acceptance_rate_{k}", f"val/acceptance_rate_{k}") for k in offsets if k > 1}
    lengths = ("train/mean_acceptance_length", "val/mean_acceptance_length")
    by_source = {source: ("", f"val/mean_acceptance_length@{source}") for source in sources}
    drift = {"Change of the loss": "nats", "KL divergence": "nats", "First choices that changed": "share"}
    columns = ("drift/nll_change", "drift/kl", "drift/flips")
    course = {"Tokens per second": "tokens_per_s", "Gradient norm": "grad_norm/all", "Learning rate": "lr"}
    return [
        Section("Loss by offset", LOSS_NOTE, _of_each(runs, "Loss", "nats per target", losses), "No losses yet"),
        Section(
            "Acceptance",
            ACCEPTANCE_NOTE,
            [
                *_panel(runs, "Acceptance length", "tokens per forward", lengths),
                *_panel(runs, "Acceptance length under sampling", "tokens per forward", ("", SAMPLED)),
                *_of_each(runs, "Accepted", "share of positions", kept, top=1),
            ],
            "Nothing is drafted: one offset, or no figures yet",
        ),
        Section(
            "Acceptance by source",
            "Acceptance length in validation, tokens per forward.",
            _of_each(runs, "Acceptance length by source", "tokens per forward", by_source),
            "Not recorded: only runs that train on a mixture (data.mixture) and validate have it",
        ),
        Section(
            "Drift of the main head",
            "Against the model at the start, on the guard's held-out sequences; the band is a 95 % interval.",
            [
                panel
                for (title, unit), column in zip(drift.items(), columns, strict=True)
                for panel in _panel(runs, title, unit, ("", column))
            ],
            "Not recorded: no run has the guard against drift on (health.drift)",
        ),
        Section(
            "Course of training",
            "",
            [panel for title, column in course.items() for panel in _panel(runs, title, "", (column, ""))],
            "No figures yet",
        ),
    ]


SAMPLED = "val/sampled_acceptance_length"
LOSS_NOTE = "Cross-entropy; thin lines are training, thick ones with symbols validation. Offset 1 is the main head."
ACCEPTANCE_NOTE = (
    "By the main head, greedily: the share of positions at which the drafts of all offsets up to this one are kept, "
    "and the tokens per forward that this makes. Thin lines are training, thick ones with symbols validation."
)


def _names(runs: list[Run]) -> set[str]:
    return {name for run in runs for name in (*run.curves.points, *run.curves.holes)}


def _of_each(
    runs: list[Run], title: str, unit: str, members: dict[str, tuple[str, str]], top: float | None = None
) -> list[dict[str, Any]]:
    if len(runs) == 1:
        lines = [line for name, pair in members.items() for line in _lines(runs, pair, visible(name, kept=""))]
        return [_chart(title, unit, lines, top)] if lines else []
    panels = (_panel(runs, f"{title}, {name}", unit, pair, top) for name, pair in members.items())
    return [panel for found in panels for panel in found]


def _panel(
    runs: list[Run], title: str, unit: str, pair: tuple[str, str], top: float | None = None
) -> list[dict[str, Any]]:
    lines = _lines(runs, pair, None)
    return [_chart(title, unit, lines, top)] if lines else []


def _chart(title: str, unit: str, lines: list[dict[str, Any]], top: float | None) -> dict[str, Any]:
    return {"title": visible(title, kept=""), "unit": unit, "lines": lines, "top": top}


def _lines(runs: list[Run], pair: tuple[str, str], name: str | None) -> list[dict[str, Any]]:
    """Name the columns of a line for every run that has one of them; a style of its own where a run has several."""
    train, val = pair
    return [
        {"run": index, "name": name, "train": train, "val": val}
        for index, run in enumerate(runs)
        if any(column in run.curves.points or column in run.curves.holes for column in pair)
    ]


def data_of(runs: list[Run], sections: Iterable[Section]) -> dict[str, Any]:
    """Return what the page's script reads: the charts, and the curves that they name; only plain values."""
    panels = [panel for section in sections for panel in section.panels]
    return {
        "runs": [
            {
                "name": visible(run.name, kept=""),
                "phase_ends": run.curves.phase_ends,
                "curves": {
                    name: [[step for step, _ in points], [float(f"{value:.5g}") for _, value in points]]
                    for name, points in run.curves.points.items()
                },
                "holes": {name: steps[:MOST_HOLES] for name, steps in run.curves.holes.items()},
            }
            for run in runs
        ],
        "panels": panels,
    }
