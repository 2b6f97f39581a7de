"""What drafting gains: `mtp bench decode`.

Plain greedy decoding and every decoder that fits the heads, for several lengths of drafts and batches, on the same
prompts in one process and in interleaved rounds (`decode_rounds.py`); speed-ups are taken within a round. Prefill is
timed apart. A batch runs until the last of its texts ends; all texts have the same number of tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from rich.table import Table

from mtp_lightning.bench.decode_picture import draw_figures
from mtp_lightning.bench.decode_prompts import held_out_prompts, held_out_tree
from mtp_lightning.bench.decode_rounds import Way, WayTimings, time_ways
from mtp_lightning.bench.machine import Machine, describe_machine
from mtp_lightning.bench.showing import add_rows, build_table, console, number, write_json
from mtp_lightning.checkpoint.loading import load_model
from mtp_lightning.data.corpus import recipe_tokenizer
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.recipe.sections import Recipe

BUSY_LOAD = 0.3
TREE_DRAFTS = 16


@dataclass(frozen=True)
class DecodeFigure:
    """What one way of decoding took and achieved; counters are named as vLLM's."""

    batch: int
    decoder: str
    draft_length: int | str | None
    is_ceiling: bool  # drafts were written down from the plain text: all are right
    tokens_per_s: float  # of all rows together, without prefill
    speedup: float  # over plain greedy, median of the ratios within rounds
    accepted_length: float
    efficiency: float  # speedup / accepted_length
    prefill_s: float
    decode_s: list[float]  # one per round
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: list[int]
    cumulative_acceptance: list[float]
    conditional_acceptance: list[float | None]
    histogram: dict[int, int]  # steps by number of drafts kept
    same_texts: float  # share of the texts that are those of plain greedy


@dataclass(frozen=True)
class DecodePlan:
    """What to measure."""

    batches: Sequence[int] = (1, 4, 16)
    prompt_tokens: int = 64
    new_tokens: int = 128
    rounds: int = 3


def bench_decode(
    path: Path,
    plan: DecodePlan,
    *,
    prompts: Sequence[bytes] | None,
    device: torch.device,
    dtype: torch.dtype | None,
    json_path: Path | None,
    png_path: Path | None,
) -> None:
    """Measure a trained model, print a table, and write figures and picture where paths are given.

    Args:
        path: Run, checkpoint or exported folder.
        plan: What to measure.
        prompts: Texts to continue, taken in turn; None for the beginnings of held-out rows.
        device: Where to run.
        dtype: Type of the weights; None for that in which they are stored.
        json_path: File for the figures.
        png_path: File for the picture.
    """
    recipe, model = load_model(path, device=device, dtype=dtype)
    machine = describe_machine(device)
    encoded = _encoded(recipe, prompts, plan)
    tree = held_out_tree(recipe, model, TREE_DRAFTS) if prompts is None else None
    timings = time_ways(model, encoded, tree, plan.batches, new_tokens=plan.new_tokens, rounds=plan.rounds)
    figures = [decode_figure(way, batch, timings) for batch, way in timings]
    screen = console()
    screen.print(f"Decoding: {recipe.name}", style="bold")
    screen.print(describe(recipe, model, plan), "", sep="\n")
    screen.print(decode_table(figures), "", sep="\n")
    for remark in remarks(machine, figures):
        screen.print(remark)
    if png_path is not None:
        draw_figures(figures, png_path, title=f"{recipe.name} on {machine}")
        screen.print(f"Picture written to {png_path}", soft_wrap=True)
    write_json(
        json_path,
        {
            "benchmark": "decode",
            "recipe": recipe.model_dump(mode="json"),
            "machine": asdict(machine),
            "plan": asdict(plan),
            "tree": tree and asdict(tree),
            "figures": [asdict(figure) for figure in figures],
        },
    )


def _encoded(recipe: Recipe, prompts: Sequence[bytes] | None, plan: DecodePlan) -> list[list[int]]:
    """Give every row of the largest batch a prompt."""
    most = max(plan.batches)
    if prompts is None:
        return held_out_prompts(recipe, most, plan.prompt_tokens)
    tokenizer = recipe_tokenizer(recipe)
    encoded: list[list[int]] = [tokenizer.encode(prompt)[: plan.prompt_tokens].tolist() for prompt in prompts]
    return [encoded[index % len(encoded)] for index in range(most)]


def decode_figure(way: Way, batch: int, timings: dict[tuple[int, Way], WayTimings]) -> DecodeFigure:
    """Put one way's time and counters together, beside plain greedy at the same batch."""
    mine, plain = timings[batch, way], timings[batch, Way("greedy", None)]
    pairs = zip(plain.decode_s, mine.decode_s, strict=True)
    speedup = median(alone_s / taken_s for alone_s, taken_s in pairs)
    statistics = mine.statistics
    same = [text == other for text, other in zip(mine.texts, plain.texts, strict=True)]
    return DecodeFigure(
        batch=batch,
        decoder=way.decoder,
        draft_length=way.draft_length,
        is_ceiling=way.is_ceiling,
        tokens_per_s=(statistics.num_emitted_tokens - statistics.num_prompts) / median(mine.decode_s),
        speedup=speedup,
        accepted_length=statistics.accepted_length,
        efficiency=speedup / statistics.accepted_length,
        prefill_s=median(mine.prefill_s),
        decode_s=mine.decode_s,
        num_drafts=statistics.num_drafts,
        num_draft_tokens=statistics.num_draft_tokens,
        num_accepted_tokens=statistics.num_accepted_tokens,
        num_accepted_tokens_per_pos=statistics.num_accepted_tokens_per_pos,
        cumulative_acceptance=statistics.cumulative_acceptance,
        conditional_acceptance=[None if rate != rate else rate for rate in statistics.conditional_acceptance],
        histogram=statistics.histogram,
        same_texts=sum(same) / len(same),
    )


def decode_table(figures: list[DecodeFigure]) -> Table:
    """Lay the figures out, a section per batch; fits 80 columns."""
    columns = ["\nbatch", "\ndecoder", "\ndrafts", "tokens\n/ s", "speed-\nup", "accepted\nlength", "effi-\nciency"]
    columns += ["drafts kept, %\nfirst, second, ...", "same\ntext"]
    table = build_table(columns, left=1, gap=1)
    add_rows(table, [_row(figure) for figure in figures])
    return table


def _row(figure: DecodeFigure) -> list[str]:
    return [
        str(figure.batch),
        "ceiling" if figure.is_ceiling else figure.decoder,
        "-" if figure.draft_length is None else str(figure.draft_length),
        number(figure.tokens_per_s, ",.0f"),
        number(figure.speedup, ".2f"),
        number(figure.accepted_length, ".2f"),
        number(figure.efficiency, ".2f"),
        " ".join(f"{share:.0%}"[:-1] for share in figure.cumulative_acceptance[:7]),
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


def remarks(machine: Machine, figures: list[DecodeFigure]) -> list[str]:
    """Say how to read the table."""
    prefill = median(figure.prefill_s for figure in figures if figure.decoder == "greedy")
    lines = [
        "speed-up: over greedy, which drafts nothing, at the same batch; median of the ratios within "
        f"{len(figures[0].decode_s)} interleaved rounds. Prefill is not in it: {prefill:.3g} s for greedy.",
        "accepted length: 1 + drafts kept / steps. efficiency: speed-up / accepted length. drafts kept: share of the "
        "steps that kept the first draft, the first two, and so on.",
        "ceiling: drafts copied from the plain text, so that all are right; the heads run all the same.",
        f"Measured on {machine}.",
    ]
    if machine.device == "cpu" and machine.load >= BUSY_LOAD:
        lines.append(f"Others kept {machine.load:.0%} of the cores busy when this began: expect noise.")
    if any(figure.same_texts < 1 for figure in figures):
        lines.append(
            "same text below 100%: two tokens scored alike within rounding, which differs with the number of "
            "positions per forward; in float64 it does not happen."
        )
    return lines
