"""The picture of a comparison of adaptations: what the second token costs the first."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from mtp_lightning.bench.adapt_rows import AdaptRow
from mtp_lightning.bench.decoding.report import COLOURS
from mtp_lightning.console.plots import save_picture
from mtp_lightning.evaluation.comparison import Spread

MARKERS = "osD^vPX"
BLACK = "#000000"  # after the colours of other pictures: one for each of seven recipes
GREY = "0.6"


def draw_rows(rows: Sequence[AdaptRow], path: Path, *, top: int, title: str) -> None:
    """Draw a point per recipe: next-token accuracy to the right, that of the 2nd token upwards, with intervals.

    Hollow and larger, and tied to it, is the same run without its 2nd head, by marginalization; recipes that do not
    train that head have the hollow point alone. The dashed line is the first recipe's.

    Raises:
        RunFolderError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    drawn = [row for row in rows if len(row.offsets) > 1]
    for row, colour, marker in zip(drawn, cycle((*COLOURS, BLACK)), cycle(MARKERS)):
        _draw_row(axes, row, colour, marker)
    if drawn:
        base = drawn[0].offsets[1].marginal.mean
        axes.axhline(base, color=GREY, linewidth=1, linestyle="--", zorder=0)
    axes.plot([], [], "o", color=GREY, label="filled: 2nd token by its head")
    axes.plot([], [], "o", color=GREY, markerfacecolor="white", label="hollow: by the main head, marginalized")
    if drawn:
        axes.plot([], [], "--", color=GREY, linewidth=1, label=f"that of {drawn[0].name}")
    axes.set(title=title, xlabel=f"next token: top-{top} accuracy", ylabel=f"2nd token: top-{top} accuracy")
    axes.grid(alpha=0.25)
    axes.margins(0.08)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save_picture(figure, path, "--plot")


def _draw_row(axes: Any, row: AdaptRow, colour: str, marker: str) -> None:
    second = row.offsets[1]
    has_head = second.head is not None and 2 not in row.idle_offsets
    shape = {"color": colour, "marker": marker, "linestyle": "none", "capsize": 3}
    hollow_label = {} if has_head else {"label": row.name}
    _point(axes, row.first, second.marginal, **shape, markersize=11, markerfacecolor="white", **hollow_label)
    if has_head and second.head is not None:
        ends = (second.marginal.mean, second.head.mean)
        axes.plot([row.first.mean] * 2, ends, ":", color=colour, linewidth=1, zorder=0)
        _point(axes, row.first, second.head, **shape, markersize=6, label=row.name)


def _point(axes: Any, across: Spread, up: Spread, **style: Any) -> None:
    axes.errorbar([across.mean], [up.mean], xerr=[across.margin or 0.0], yerr=[up.margin or 0.0], **style)
