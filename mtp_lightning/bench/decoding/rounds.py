"""Times of several ways of decoding in one process: interleaved rounds on the same prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mtp_lightning.console.tables import watched
from mtp_lightning.data.loading.factory import open_rows
from mtp_lightning.decode import Generation, Settings, Statistics, Tree, applicable_decoders, build_tree, generate
from mtp_lightning.decode.settings import ADAPTIVE, Decoder
from mtp_lightning.decode.tree import choice_shares
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.recipe.schema.root import Recipe

TREE_ROWS = 16
TREE_CHOICES = 8


def held_out_prompts(recipe: Recipe, num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Take the beginnings of held-out rows, spread evenly.

    Raises:
        DataError: The recipe's shards are not there or are damaged.
    """
    rows = open_rows(recipe, "validation")
    numbers = rows.spread(min(num_prompts, len(rows)))
    beginnings = rows.read(numbers)["tokens"][:, : min(num_tokens, recipe.data.seq_len)].tolist()
    return [beginnings[index % len(beginnings)] for index in range(num_prompts)]


def held_out_shares(recipe: Recipe, model: MtpModel) -> list[list[float]]:
    """Measure on held-out rows how often each choice of each offset is the main head's."""
    rows = open_rows(recipe, "validation")
    arrays = rows.read(rows.spread(min(TREE_ROWS, len(rows))))
    device = model.trunk.embed_tokens.weight.device
    tokens, documents = (
        torch.from_numpy(np.asarray(arrays[name], dtype=np.int64)).to(device) for name in ("tokens", "documents")
    )
    return choice_shares(model, tokens, documents, TREE_CHOICES)


def held_out_tree(recipe: Recipe, model: MtpModel, num_drafts: int) -> Tree | None:
    """Build a tree for the recipe's text, where the heads can fill one."""
    if "tree" not in applicable_decoders(model):
        return None
    return build_tree(held_out_shares(recipe, model), num_drafts)


@dataclass(frozen=True)
class DecodeVariant:
    """One way to decode."""

    decoder: Decoder
    draft_length: int | Literal["adaptive"] | None
    is_ceiling: bool = False
    is_compiled: bool = False


@dataclass
class VariantTimings:
    """What one way took in every round, and what it gave, which is the same in all but adaptive ones."""

    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)


class WrittenDrafts:
    """Drafts copied from the plain text of the same prompts: all are right."""

    def __init__(self, prompts: Sequence[list[int]], plain: Generation, device: torch.device) -> None:
        texts = [torch.tensor([*prompt, *text]) for prompt, text in zip(prompts, plain.tokens, strict=True)]
        self.texts = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device)
        self.places = torch.arange(self.texts.shape[1], device=device)

    def __call__(self, lengths: Tensor, num_drafts: int) -> Tensor:
        """Copy the drafts of every row: (B,) -> (B, K)."""
        slots = lengths[:, None] + 1 + self.places[:num_drafts]
        return self.texts.gather(1, slots.clamp(max=self.texts.shape[1] - 1))


def ways_of(model: MtpModel, tree: Tree | None, *, compiled: bool = False) -> list[DecodeVariant]:
    """List plain greedy, every decoder that fits at every length of drafts, a tree if there is one, and the ceiling.

    With `compiled`, all of them but the ceiling that draft as many tokens in every step are listed once more.
    """
    variants = [DecodeVariant("greedy", None)]
    drafting = [decoder for decoder in applicable_decoders(model) if decoder not in ("greedy", "tree")]
    for decoder in drafting:
        variants += [DecodeVariant(decoder, length) for length in range(1, model.num_offsets)]
    if drafting:
        variants.append(DecodeVariant(drafting[0], ADAPTIVE))
        if tree is not None and "tree" in applicable_decoders(model):
            variants.append(DecodeVariant("tree", None))
        variants.append(DecodeVariant(drafting[0], model.num_offsets - 1, is_ceiling=True))
    fixed = [own for own in variants if own.draft_length != ADAPTIVE and not own.is_ceiling]
    return variants + [replace(own, is_compiled=True) for own in fixed] * compiled


def time_variants(
    model: MtpModel,
    prompts: list[list[int]],
    tree: Tree | None,
    batches: Sequence[int],
    *,
    new_tokens: int,
    rounds: int,
    compiled: bool = False,
) -> dict[tuple[int, DecodeVariant], VariantTimings]:
    """Measure all ways at all batches; every other round in reverse order, after one that is not timed."""
    cells = [(batch, variant) for batch in batches for variant in ways_of(model, tree, compiled=compiled)]
    timings = {cell: VariantTimings() for cell in cells}
    settings = Settings(max_new_tokens=new_tokens, tree=tree)
    forced_drafts_by_batch = {batch: _script(model, prompts[:batch], settings) for batch in batches}
    with watched((1 + rounds) * len(cells)) as report:
        for number in range(1 + rounds):
            for index, (batch, variant) in enumerate(cells[:: -1 if number % 2 else 1]):
                report(
                    f"batch {batch}, {variant.decoder} {variant.draft_length or ''}{'*' * variant.is_compiled}",
                    done=number * len(cells) + index,
                )
                chosen = replace(
                    settings,
                    decoder=variant.decoder,
                    draft_length=variant.draft_length,
                    compile=variant.is_compiled,
                )
                forced_drafts = forced_drafts_by_batch[batch] if variant.is_ceiling else None
                made = generate(model, prompts[:batch], chosen, forced_drafts=forced_drafts)
                if number:
                    _note(timings[batch, variant], made)
    return timings


def _script(model: MtpModel, prompts: list[list[int]], settings: Settings) -> WrittenDrafts:
    longer = replace(settings, decoder="greedy", max_new_tokens=settings.max_new_tokens + model.num_offsets)
    return WrittenDrafts(prompts, generate(model, prompts, longer), model.trunk.embed_tokens.weight.device)


def _note(timings: VariantTimings, made: Generation) -> None:
    assert made.statistics.is_consistent, "tokens emitted are not those that the steps account for"
    timings.prefill_s.append(made.prefill_s)
    timings.decode_s.append(made.decode_s)
    timings.texts, timings.statistics = made.tokens, made.statistics
