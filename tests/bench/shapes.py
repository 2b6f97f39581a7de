"""Recipes that a benchmark finishes in moments."""

from mtp_lightning.recipe.schema.root import Recipe


def quick_recipe(**heads):
    return Recipe.model_validate(
        {
            "name": "quick",
            "model": {"width": 32, "num_layers": 4, "num_attention_heads": 4, "vocabulary": 300},
            "heads": heads,
            "data": {"window_tokens": 16},
            "batch": {"rows": 4, "micro_rows": 2},
            "run": {"device": "cpu", "threads": 1},
        }
    )
