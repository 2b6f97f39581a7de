"""The picture of a run: losses and acceptance over steps."""

import math
from pathlib import Path
from typing import Any

from mtp_lightning.console.plots import picture_of
from mtp_lightning.files.durable import write_whole
from mtp_lightning.training.logging.metrics_files import Row, read_rows

# Okabe and Ito's colours, which stay apart under every common kind of colour blindness.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999999")
_LENGTH_COLOUR = "#000000"
_LIGHT = 0.4
_SIZE_PIXELS = (1200, 500)
_DOTS_PER_INCH = 100
_LEGEND_COLUMNS = 8


def draw_training_curves(csv_path: Path, png_path: Path, *, title: str = "", unit: str = "nats per token") -> None:
    """Draw a metrics.csv: left the loss of every offset, right acceptance and acceptance length.

    Training is light, validation dark with a dot at each. A figure that was never measured is left out.
    """
    figure = build_figure(read_rows(csv_path), title=title, unit=unit)
    write_whole(png_path, picture_of(figure, png_path))


def build_figure(rows: list[Row], *, title: str, unit: str) -> Any:
    """Build the matplotlib figure; needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = _SIZE_PIXELS
    figure = Figure(figsize=(width / _DOTS_PER_INCH, height / _DOTS_PER_INCH), dpi=_DOTS_PER_INCH)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    if title:
        figure.suptitle(title, parse_math=False)  # a name may hold dollar signs
    _draw_losses(left, rows, unit)
    _draw_acceptance(right, rows)
    rows_of_legend = _add_legend(figure)
    # fixed, as a layout that measures every text takes longer than the drawing
    figure.subplots_adjust(left=0.075, right=0.94, bottom=0.12 + 0.05 * rows_of_legend, top=0.86, wspace=0.16)
    return figure


def _draw_losses(axes: Any, rows: list[Row], unit: str) -> None:
    for k in _offsets_of(rows, "loss"):
        _draw_pair(axes, rows, f"loss_{k}", colour=_colour_of(k), label=f"offset {k}")
    axes.set_title("Loss", y=1.0)
    axes.set_ylabel(f"loss ({unit})")
    axes.set_xlabel("step")
    axes.grid(alpha=0.25)


def _draw_acceptance(axes: Any, rows: list[Row]) -> None:
    """Draw acceptance with a second axis for the acceptance length, whose ends 1 and n match those of the first."""
    axes.set_title("Acceptance by the main head", y=1.0)
    axes.set_xlabel("step")
    offsets = _offsets_of(rows, "acceptance_rate")
    if not offsets:
        axes.text(0.5, 0.5, "no acceptance: one offset, or no figures yet", ha="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    for k in offsets:
        _draw_pair(axes, rows, f"acceptance_rate_{k}", colour=_colour_of(k), label=None)
    axes.set_ylabel("offsets 2 to k all accepted (share of positions)")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.25)
    lengths = axes.twinx()
    _draw_pair(lengths, rows, "mean_acceptance_length", colour=_LENGTH_COLOUR, label="acceptance length", style="--")
    lengths.set_ylabel("acceptance length (tokens per forward)")
    lengths.set_ylim(1, max(offsets))


def _draw_pair(axes: Any, rows: list[Row], name: str, *, colour: str, label: str | None, style: str = "-") -> None:
    axes.plot(*_points(rows, f"train/{name}"), style, color=colour, alpha=_LIGHT, linewidth=1)
    dark = {"linewidth": 2, "marker": "o", "markersize": 3.5, "label": label}
    axes.plot(*_points(rows, f"val/{name}"), style, color=colour, **dark)


def _add_legend(figure: Any) -> int:
    """Add it below both, and return its number of rows."""
    from matplotlib.lines import Line2D

    lines = [line for axes in figure.axes for line in axes.get_lines() if not line.get_label().startswith("_")]
    lines.append(Line2D([], [], color="grey", linewidth=2, marker="o", markersize=3.5, label="dark: validation"))
    lines.append(Line2D([], [], color="grey", linewidth=1, alpha=_LIGHT, label="light: training"))
    figure.legend(handles=lines, loc="lower center", ncols=_LEGEND_COLUMNS, frameon=False)
    return math.ceil(len(lines) / _LEGEND_COLUMNS)


def _colour_of(k: int) -> str:
    return _COLOURS[(k - 1) % len(_COLOURS)]


def _points(rows: list[Row], name: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def _offsets_of(rows: list[Row], kind: str) -> list[int]:
    names = {name.partition("/")[2] for row in rows for name in row}
    return sorted(int(name.rpartition("_")[2]) for name in names if name.startswith(f"{kind}_") and "@" not in name)
