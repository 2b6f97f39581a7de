"""What must hold for memory that is saved by computing twice."""

from collections.abc import Callable

from mtp_lightning.recipe.rules.base import Rule
from mtp_lightning.recipe.schema.root import Recipe


def _liger_lacks(field: str, plain: str, holds: Callable[[Recipe], bool], reason: str) -> Rule:
    """Build the rule that a field is plain where Liger's kernel computes the cross-entropy."""
    return Rule(
        fields=(field, "memory.loss_kernel"),
        holds=lambda recipe: recipe.memory.loss_kernel != "liger" or holds(recipe),
        expected=f"must be {plain} for memory.loss_kernel=liger: {reason}",
        hint=f"Remove {field}, or set memory.loss_kernel=own.",
    )


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
    _liger_lacks(
        "objective.backward_order",
        "sequential or bridged",
        lambda recipe: recipe.objective.backward_order != "joint",
        "joint makes all scores at once",
    ),
    _liger_lacks(
        "objective.balance",
        "none",
        lambda recipe: recipe.objective.balance == "none",
        "the kernel sums its losses, and their mean square is not known",
    ),
    _liger_lacks(
        "objective.distill",
        "null",
        lambda recipe: recipe.objective.distill is None,
        "the kernel compares no scores with a teacher's",
    ),
    _liger_lacks(
        "objective.rollout",
        "null",
        lambda recipe: recipe.objective.rollout is None,
        "the kernel cannot measure rows that do not learn",
    ),
    _liger_lacks(
        "run.precision",
        "bf16 or fp32",
        lambda recipe: recipe.run.precision != "fp16",
        "the kernel rounds scores, and gradients before they are scaled, to fp16",
    ),
)
