"""Figures of a decoding benchmark: their table, how to read it, and the picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from mtp_lightning.bench.machine import Machine
from mtp_lightning.console.plots import save_picture
from mtp_lightning.console.tables import add_rows, build_table, number
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.recipe.schema.root import Recipe

BUSY_LOAD = 0.3
# Okabe and Ito's colours, which stay apart under every common kind of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class DecodeFigure:
    """What one way of decoding took and achieved; counters are named as vLLM's."""

    batch: int
    decoder: str
    draft_length: int | str | None
    is_ceiling: bool  # drafts were written down from the plain text: all are right
    is_compiled: bool  # steps had fixed shapes and were compiled
    tokens_per_s: float  # of all rows together, without prefill
    speedup: float  # over plain greedy, median of the ratios within rounds
    mean_acceptance_length: float
    efficiency: float  # speedup / mean_acceptance_length
    prefill_s: float
    decode_s: list[float]  # one per round
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: list[int]
    acceptance_rate_per_position: list[float]
    conditional_acceptance_rate: list[float | None]
    histogram: dict[int, int]  # steps by number of drafts kept
    same_texts: float  # share of the texts that are those of plain greedy


@dataclass(frozen=True)
class DecodePlan:
    """What to measure."""

    batches: Sequence[int] = (1, 4, 16)
    prompt_tokens: int = 64
    new_tokens: int = 128
    rounds: int = 3
    compile: bool = False


def decode_table(figures: list[DecodeFigure]) -> Table:
    """Lay the figures out, a section per batch; fits 80 columns."""
    columns = ["\nbatch", "\ndecoder", "\ndrafts", "tokens\n/ s", "speed-\nup", "accept.\nlength", "effi-\nciency"]
    columns += ["drafts kept, %\nfirst, second, ...", "same\ntext"]
    table = build_table(columns, left=1, gap=1)
    add_rows(table, [_row(figure) for figure in figures])
    return table


def _row(figure: DecodeFigure) -> list[str]:
    return [
        str(figure.batch),
        ("ceiling" if figure.is_ceiling else figure.decoder) + "*" * figure.is_compiled,
        "-" if figure.draft_length is None else str(figure.draft_length),
        number(figure.tokens_per_s, ",.0f"),
        number(figure.speedup, ".2f"),
        number(figure.mean_acceptance_length, ".2f"),
        number(figure.efficiency, ".2f"),
        " ".join(f"{share:.0%}"[:-1] for share in figure.acceptance_rate_per_position[:7]),
        number(figure.same_texts, ".0%"),
    ]


def describe(recipe: Recipe, model: MtpModel, plan: DecodePlan) -> str:
    """Say in one line what is measured."""
    weight = model.trunk.embed_tokens.weight
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    dtype = str(weight.dtype).removeprefix("torch.")
    return (
        f"{recipe.heads.kind} heads, n={model.num_offsets}, {millions:,.1f} M parameters in {dtype}, "
        f"prompts of at most {plan.prompt_tokens} tokens and {plan.new_tokens} new ones"
    )


def table_notes(machine: Machine, figures: list[DecodeFigure]) -> list[str]:
    """Say how to read the table."""
    prefill = median(figure.prefill_s for figure in figures if figure.decoder == "greedy")
    lines = [
        "speed-up: over greedy, which drafts nothing, at the same batch; median of the ratios within "
        f"{len(figures[0].decode_s)} interleaved rounds. Prefill is not in it: {prefill:.3g} s for greedy.",
        "acceptance length: 1 + drafts kept / steps. efficiency: speed-up / acceptance length. drafts kept: share of "
        "the steps that kept the first draft, the first two, and so on.",
        "ceiling: drafts copied from the plain text, so that all are right; the heads run all the same.",
        f"Measured on {machine}.",
    ]
    if any(figure.is_compiled for figure in figures):
        lines.insert(3, "*: steps of fixed shapes, compiled (--compile); compiling is not in the times.")
    if machine.device == "cpu" and machine.load >= BUSY_LOAD:
        lines.append(f"Others kept {machine.load:.0%} of the cores busy when this began: expect noise.")
    if any(figure.same_texts < 1 for figure in figures):
        lines.append(
            "same text below 100%: two tokens scored alike within rounding, which differs with the number of "
            "positions per forward; in float64 it does not happen."
        )
    return lines


def draw_figures(figures: list[DecodeFigure], path: Path, *, title: str) -> None:
    """Draw left the speed-up of every decoder and batch over the length of drafts, right the drafts kept by place.

    Raises:
        RunFolderError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, parse_math=False)
    left, right = figure.subplots(1, 2)
    _draw_speedups(left, figures)
    _draw_acceptance(right, figures)
    save_picture(figure, path, "--png")


def _draw_speedups(axes: Any, figures: list[DecodeFigure]) -> None:
    chains = [f for f in figures if isinstance(f.draft_length, int) and not f.is_ceiling]
    lines = list(dict.fromkeys((f.decoder + "*" * f.is_compiled, f.batch) for f in chains))
    for index, (decoder, batch) in enumerate(lines):
        mine = [f for f in chains if (f.decoder + "*" * f.is_compiled, f.batch) == (decoder, batch)]
        places, colour = [f.draft_length for f in mine], COLOURS[index % len(COLOURS)]
        axes.plot(places, [f.speedup for f in mine], "o-", color=colour, label=f"{decoder}, batch {batch}")
    widest = {f.draft_length: f.mean_acceptance_length for f in chains}
    axes.plot(list(widest), list(widest.values()), "k--", label="acceptance length")
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(title="Speed-up over plain greedy", xlabel="drafts per step", ylabel="times as fast")
    axes.set_xticks(list(widest))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)


def _draw_acceptance(axes: Any, figures: list[DecodeFigure]) -> None:
    measured = [
        f
        for f in figures
        if f.acceptance_rate_per_position and not f.is_ceiling and f.draft_length != "adaptive" and not f.is_compiled
    ]
    longest = max((len(f.acceptance_rate_per_position) for f in measured), default=0)
    by_decoder = {f.decoder: f for f in measured if len(f.acceptance_rate_per_position) == longest}
    for index, (decoder, chosen) in enumerate(by_decoder.items()):
        places = range(1, longest + 1)
        conditional = [float("nan") if rate is None else rate for rate in chosen.conditional_acceptance_rate]
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(places, chosen.acceptance_rate_per_position, "o-", color=colour, label=f"{decoder}: all up to it")
        axes.plot(places, conditional, "o:", color=colour, label=f"{decoder}: given those before it")
    axes.set(title="Drafts kept", xlabel="place in the draft", ylabel="share of steps", ylim=(0, 1))
    axes.set_xticks(range(1, longest + 1))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
