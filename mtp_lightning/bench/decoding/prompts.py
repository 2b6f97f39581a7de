"""Held-out text for benchmarks of decoding, and trees that fit it."""

import numpy as np
import torch

from mtp_lightning.data.loading.factory import open_rows
from mtp_lightning.decode import Tree, applicable_decoders, build_tree
from mtp_lightning.decode.tree_files import choice_shares
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
