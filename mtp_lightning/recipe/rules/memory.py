"""What must hold for memory that is saved by computing twice."""

from mtp_lightning.recipe.rules.base import Rule

MEMORY_RULES: tuple[Rule, ...] = (
    Rule(
        fields=("memory.mlp_tile", "model.family"),
        holds=lambda recipe: recipe.memory.mlp_tile is None or not recipe.model.is_foreign,
        expected="must be null for family transformers, whose layers have feed-forwards of their own",
        hint="Remove memory.mlp_tile, or import the model in a family of this package.",
    ),
    Rule(
        fields=("memory.offload_activations", "memory.recompute_trunk", "memory.recompute_heads"),
        holds=lambda recipe: (
            not recipe.memory.offload_activations or recipe.memory.recompute_trunk or recipe.recomputes_heads
        ),
        expected="must be false where no layer is recomputed: what it moves are the inputs of these",
        hint="Set memory.recompute_trunk=true, or remove memory.offload_activations.",
    ),
)
