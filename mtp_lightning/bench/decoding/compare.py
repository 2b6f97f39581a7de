"""What drafting gains: `mtp bench decode`.

Plain greedy decoding and every decoder that fits the heads, for several lengths of drafts and batches, on the same
prompts in one process and in interleaved rounds (`rounds.py`); speed-ups are taken within a round. Prefill is
timed apart. A batch runs until the last of its texts ends; all texts have the same number of tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch

from mtp_lightning.bench.decoding.report import (
    DecodeFigure,
    DecodePlan,
    decode_table,
    describe,
    draw_figures,
    table_notes,
)
from mtp_lightning.bench.decoding.rounds import (
    DecodeVariant,
    VariantTimings,
    held_out_prompts,
    held_out_tree,
    time_variants,
)
from mtp_lightning.bench.machine import describe_machine
from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.console.tables import console, write_json
from mtp_lightning.data.loading.corpus import recipe_tokenizer
from mtp_lightning.decode.packed_linear import pack_linear_maps
from mtp_lightning.decode.static import check_compilable
from mtp_lightning.recipe.schema.root import Recipe

TREE_DRAFTS = 16


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
    pack_linear_maps(model)
    if plan.compile:
        check_compilable(model)
    machine = describe_machine(device)
    encoded = _encoded(recipe, prompts, plan)
    tree = held_out_tree(recipe, model, TREE_DRAFTS) if prompts is None else None
    timings = time_variants(
        model,
        encoded,
        tree,
        plan.batches,
        new_tokens=plan.new_tokens,
        rounds=plan.rounds,
        compiled=plan.compile,
    )
    figures = [decode_figure(variant, batch, timings) for batch, variant in timings]
    screen = console()
    screen.print(f"Decoding: {recipe.name}", style="bold")
    screen.print(describe(recipe, model, plan), "", sep="\n")
    screen.print(decode_table(figures), "", sep="\n")
    for remark in table_notes(machine, figures):
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


def decode_figure(
    variant: DecodeVariant, batch: int, timings: dict[tuple[int, DecodeVariant], VariantTimings]
) -> DecodeFigure:
    """Put one way's time and counters together, beside plain greedy at the same batch."""
    mine, plain = timings[batch, variant], timings[batch, DecodeVariant("greedy", None)]
    pairs = zip(plain.decode_s, mine.decode_s, strict=True)
    speedup = median(alone_s / taken_s for alone_s, taken_s in pairs)
    statistics = mine.statistics
    same = [text == other for text, other in zip(mine.texts, plain.texts, strict=True)]
    return DecodeFigure(
        batch=batch,
        decoder=variant.decoder,
        draft_length=variant.draft_length,
        is_ceiling=variant.is_ceiling,
        is_compiled=variant.is_compiled,
        tokens_per_s=(statistics.num_emitted_tokens - statistics.num_prompts) / median(mine.decode_s),
        speedup=speedup,
        mean_acceptance_length=statistics.mean_acceptance_length,
        efficiency=speedup / statistics.mean_acceptance_length,
        prefill_s=median(mine.prefill_s),
        decode_s=mine.decode_s,
        num_drafts=statistics.num_drafts,
        num_draft_tokens=statistics.num_draft_tokens,
        num_accepted_tokens=statistics.num_accepted_tokens,
        num_accepted_tokens_per_pos=statistics.num_accepted_tokens_per_pos,
        acceptance_rate_per_position=statistics.acceptance_rate_per_position,
        conditional_acceptance_rate=[None if rate != rate else rate for rate in statistics.conditional_acceptance_rate],
        histogram=statistics.histogram,
        same_texts=sum(same) / len(same),
    )
