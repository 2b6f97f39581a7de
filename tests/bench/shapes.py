"""Recipes that a benchmark finishes in moments."""

from mtp_lightning.recipe.schema.root import Recipe


def quick_recipe(**heads):
    return Recipe.model_validate(
        {
            "name": "quick",
            "model": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 300},
            "heads": heads,
            "data": {"seq_len": 16},
            "batch": {"global_batch_size": 4, "micro_batch_size": 2},
            "run": {"device": "cpu", "threads": 1},
        }
    )
