"""The picture of a run: losses and acceptance over steps."""

import math
from pathlib import Path
from typing import Any

from mtp_lightning.training.callbacks.metrics_table import Row, read_rows

# Okabe and Ito's colours, which stay apart under every common kind of colour blindness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_SIZE_PIXELS = (1200, 500)
_DOTS_PER_INCH = 100


def draw_training_curves(csv_path: Path, png_path: Path, *, title: str = "", unit: str = "nats per token") -> None:
    """Draw a metrics.csv: left the loss of every offset, right acceptance and accepted length.

    Training is light, validation dark with a dot at each. A figure that was never measured is left out.
    """
    figure = build_figure(read_rows(csv_path), title=title, unit=unit)
    png_path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png_path)


def build_figure(rows: list[Row], *, title: str, unit: str) -> Any:
    """Build the matplotlib figure; needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = _SIZE_PIXELS
    figure = Figure(figsize=(width / _DOTS_PER_INCH, height / _DOTS_PER_INCH), dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    if title:
        figure.suptitle(title)
    _draw_losses(left, rows, unit)
    _draw_acceptance(right, rows)
    return figure


def _draw_losses(axes: Any, rows: list[Row], unit: str) -> None:
    for k in _offsets_of(rows, "loss"):
        _draw_pair(axes, rows, f"loss_{k}", k, f"offset {k}")
    axes.set_title("Loss of every offset")
    axes.set_ylabel(f"loss ({unit})")
    _finish(axes)


def _draw_acceptance(axes: Any, rows: list[Row]) -> None:
    axes.set_title("Acceptance of the main head's choice")
    axes.set_ylabel("cumulative acceptance (share of positions)")
    axes.set_ylim(0, 1)
    for k in _offsets_of(rows, "cumulative_acceptance"):
        _draw_pair(axes, rows, f"cumulative_acceptance_{k}", k, f"offsets 2 to {k}" if k > 2 else "offset 2")
    lengths = axes.twinx()
    _draw_pair(lengths, rows, "accepted_length", 7, "accepted length", style="--")
    lengths.set_ylabel("accepted length (tokens per forward)")
    lengths.set_ylim(bottom=1)
    _finish(axes, also=lengths)


def _draw_pair(axes: Any, rows: list[Row], name: str, k: int, label: str, *, style: str = "-") -> None:
    colour = _COLOURS[(k - 1) % len(_COLOURS)]
    axes.plot(*_points(rows, f"train/{name}"), style, color=colour, alpha=0.35, linewidth=1)
    axes.plot(*_points(rows, f"val/{name}"), style, color=colour, linewidth=2, marker="o", markersize=3.5, label=label)


def _points(rows: list[Row], name: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def _offsets_of(rows: list[Row], kind: str) -> list[int]:
    names = {name.partition("/")[2] for row in rows for name in row}
    return sorted(int(name.rpartition("_")[2]) for name in names if name.startswith(f"{kind}_"))


def _finish(axes: Any, *, also: Any = None) -> None:
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)
    lines = axes.get_lines() + (also.get_lines() if also else [])
    lines = [line for line in lines if not line.get_label().startswith("_")]
    if lines:
        axes.legend(lines, [line.get_label() for line in lines], title="dark: validation, light: training")
