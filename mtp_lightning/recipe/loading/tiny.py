"""A recipe of any size as one that runs in a minute on a CPU, on the same code path: `debug.shrink=true`."""

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

    Heads, schedule, recomputation, precision and strategy stay what they are. The shrunk recipe is whole in itself:
    it no longer says that it has to be shrunk.
    """
    num_ranks = recipe.strategy.num_ranks
    num_offsets = max(recipe.heads.num_offsets, *(phase.extend_to or 1 for phase in recipe.phases.values()), 1)
    model = {
        "width": 32,
        "num_layers": num_layers_from_trunk(recipe) + TRUNK_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": None,
        "head_width": None,
        "mlp_width": 64,
        "vocabulary": 257,
    }
    data = {
        "kind": "shards",
        "stream": None,
        "corpus": ["stdlib:json"],
        "shards": None,
        "tokenizer": "byte",
        "validation_share": 0.2,
        "window_tokens": 8 * max(4, num_offsets),
        "workers": 0,
    }
    run = {
        "steps": 20,
        "log_every_steps": 1,
        "validate_every_steps": 10,
        "validation_rows": 2 * num_ranks,
        "checkpoint_every_steps": 10,
    }
    fields: dict[str, dict[str, Any]] = {
        "model": model,
        "data": data,
        "batch": {"rows": MICRO_BATCHES * MICRO_ROWS * num_ranks, "micro_rows": MICRO_ROWS, "ramp": None},
        "optimizer": {"warmup_steps": 2},
        "run": run,
    }
    phases = {
        name: {part: fields[part] for part in ("data", "batch", "optimizer", "run") if getattr(phase, part)}
        for name, phase in recipe.phases.items()
    }
    return node_of({**fields, "phases": phases}, ORIGIN)


SHRUNK = node_of({"debug": {"shrink": False}}, ORIGIN)
"""Laid over everything once a recipe has been shrunk."""
