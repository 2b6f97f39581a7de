"""The picture of a benchmark of decoding: speed-up and acceptance by the length of drafts."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_lightning.evaluation.pictures import save_picture

if TYPE_CHECKING:
    from mtp_lightning.bench.decode import DecodeFigure

# Okabe and Ito's colours, which stay apart under every common kind of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw_figures(figures: "list[DecodeFigure]", path: Path, *, title: str) -> None:
    """Draw left the speed-up of every decoder and batch over the length of drafts, right the drafts kept by place.

    Raises:
        RunFolderError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    _draw_speedups(left, figures)
    _draw_acceptance(right, figures)
    save_picture(figure, path, "--png")


def _draw_speedups(axes: Any, figures: "list[DecodeFigure]") -> None:
    chains = [f for f in figures if isinstance(f.draft_length, int) and not f.is_ceiling]
    lines = list(dict.fromkeys((f.decoder, f.batch) for f in chains))
    for index, (decoder, batch) in enumerate(lines):
        mine = [f for f in chains if (f.decoder, f.batch) == (decoder, batch)]
        places, colour = [f.draft_length for f in mine], COLOURS[index % len(COLOURS)]
        axes.plot(places, [f.speedup for f in mine], "o-", color=colour, label=f"{decoder}, batch {batch}")
    widest = {f.draft_length: f.accepted_length for f in chains}
    axes.plot(list(widest), list(widest.values()), "k--", label="accepted length")
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(title="Speed-up over plain greedy", xlabel="drafts per step", ylabel="times as fast")
    axes.set_xticks(list(widest))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _draw_acceptance(axes: Any, figures: "list[DecodeFigure]") -> None:
    measured = [f for f in figures if f.cumulative_acceptance and not f.is_ceiling and f.draft_length != "adaptive"]
    longest = max((len(f.cumulative_acceptance) for f in measured), default=0)
    by_decoder = {f.decoder: f for f in measured if len(f.cumulative_acceptance) == longest}
    for index, (decoder, chosen) in enumerate(by_decoder.items()):
        places = range(1, longest + 1)
        conditional = [float("nan") if rate is None else rate for rate in chosen.conditional_acceptance]
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(places, chosen.cumulative_acceptance, "o-", color=colour, label=f"{decoder}: all up to it")
        axes.plot(places, conditional, "o:", color=colour, label=f"{decoder}: given those before it")
    axes.set(title="Drafts kept", xlabel="place in the draft", ylabel="share of steps", ylim=(0, 1))
    axes.set_xticks(range(1, longest + 1))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
