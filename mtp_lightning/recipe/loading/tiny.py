"""A recipe of any size as one that runs in a minute on a CPU, on the same code path: `debug.shrink=true`."""

import math
from typing import Any

from mtp_lightning.recipe.layer_counts import num_layers_from_trunk
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.tree import Node, node_of

ORIGIN = "debug.shrink"
TRUNK_LAYERS = 2
MICRO_ROWS = 2
MICRO_BATCHES = 2


def shrinking(recipe: Recipe) -> Node:
    """Return the fields that make a recipe small: size of the model and of a step, tokens at hand, a short run.

    Heads, backward order, recomputation, precision and strategy stay, and so does the size of a model of transformers.
    The shrunk recipe is whole in itself: it no longer says that it has to be shrunk.
    """
    num_shares, num_slices = recipe.strategy.num_shares, recipe.strategy.sequence_parallel
    num_offsets = max(recipe.heads.num_offsets, *(phase.extend_to or 1 for phase in recipe.phases.values()), 1)
    model = {
        "hidden_size": 8 * math.lcm(4, num_slices),
        "num_hidden_layers": num_layers_from_trunk(recipe) + TRUNK_LAYERS,
        "num_attention_heads": math.lcm(4, num_slices),
        "num_key_value_heads": None,
        "head_dim": None,
        "intermediate_size": 64,
        "vocab_size": 257,
    }
    data = {
        "kind": "shards",
        "stream": None,
        "corpus": ["stdlib:json"],
        "shards": None,
        "tokenizer": "byte",
        "validation_fraction": 0.2,
        "seq_len": 8 * max(4, num_offsets) * num_slices,
        "workers": 0,
    }
    run = {
        "steps": 20,
        "validate_every_steps": 10,
        "validation_samples": 2 * num_shares,
    }
    drafts = {"draft_vocabulary": 128, "draft_token_ids": None}
    fields: dict[str, dict[str, Any]] = {
        "model": {} if recipe.model.is_foreign else model,
        "heads": {} if recipe.heads.draft_vocabulary is None else drafts,
        "data": data,
        "batch": {
            "global_batch_size": MICRO_BATCHES * MICRO_ROWS * num_shares,
            "micro_batch_size": MICRO_ROWS,
            "ramp": None,
        },
        "optimizer": {"warmup_steps": 2},
        "run": run,
        "checkpoint": {"every_steps": 10},
        "logging": {"every_steps": 1},
    }
    phases = {
        name: {
            part: fields[part]
            for part in ("data", "batch", "optimizer", "run", "checkpoint", "logging")
            if getattr(phase, part)
        }
        for name, phase in recipe.phases.items()
    }
    return node_of({**fields, "phases": phases}, ORIGIN)


SHRUNK = node_of({"debug": {"shrink": False}}, ORIGIN)
"""Laid over everything once a recipe has been shrunk."""
