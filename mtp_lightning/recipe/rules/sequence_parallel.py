"""What must hold for windows that are cut over ranks."""

from collections.abc import Callable

from mtp_lightning.recipe.head_kinds import registered
from mtp_lightning.recipe.rules.base import Rule, divisors
from mtp_lightning.recipe.schema.root import Recipe

FIELD = "strategy.sequence_parallel"


def _needs(holds: Callable[[Recipe], bool], fields: tuple[str, ...], expected: str, hint: str) -> Rule:
    """Build a rule of windows that are cut."""
    return Rule(
        fields=(FIELD, *fields),
        holds=lambda recipe: recipe.strategy.sequence_parallel == 1 or holds(recipe),
        expected=expected,
        hint=f"{hint}, or set {FIELD}=1.",
    )


def _divides(count: Callable[[Recipe], int], fields: tuple[str, ...], what: str) -> Rule:
    """Build the rule that N divides a number."""
    return Rule(
        fields=(FIELD, *fields),
        holds=lambda recipe: count(recipe) % recipe.strategy.sequence_parallel == 0,
        expected=f"must divide {what}",
        hint=lambda recipe: f"Set {FIELD} to {divisors(count(recipe))}.",
    )


SEQUENCE_PARALLEL_RULES: tuple[Rule, ...] = (
    _divides(
        lambda recipe: recipe.strategy.num_ranks,
        ("strategy.num_nodes", "strategy.ranks_per_node"),
        "the ranks (strategy.num_nodes x ranks_per_node): each group of so many shares its windows",
    ),
    _divides(
        lambda recipe: recipe.model.num_attention_heads,
        ("model.num_attention_heads",),
        "model.num_attention_heads: in attention each rank has an equal share of them",
    ),
    _divides(
        lambda recipe: recipe.data.seq_len,
        ("data.seq_len",),
        "data.seq_len: each rank has an equal slice of a window",
    ),
    _needs(
        lambda recipe: recipe.data.seq_len // recipe.strategy.sequence_parallel >= recipe.heads.num_offsets,
        ("data.seq_len", "heads.num_offsets"),
        "must leave each rank at least heads.num_offsets positions of a window",
        "Raise data.seq_len",
    ),
    _needs(
        lambda recipe: not recipe.model.is_foreign,
        ("model.family",),
        "must be 1 for family transformers, whose attention sees its own rank's positions alone",
        "Import the model in a family of this package",
    ),
    _needs(
        lambda recipe: registered(recipe.heads.kind) is None,
        ("heads.kind",),
        "must be 1 for a head kind of your own, which may mix positions that lie on other ranks",
        "Choose a kind of this package",
    ),
    _needs(
        lambda recipe: recipe.objective.rollout is None,
        ("objective.rollout",),
        "must be 1 with objective.rollout, whose drafts are drawn from whole windows",
        "Set objective.rollout=null",
    ),
    _needs(
        lambda recipe: recipe.memory.cache_hidden_states is None,
        ("memory.cache_hidden_states",),
        "must be 1 with memory.cache_hidden_states, which keeps the states of whole windows",
        "Set memory.cache_hidden_states=null",
    ),
    _needs(
        lambda recipe: recipe.objective.token_order is None,
        ("objective.token_order",),
        "must be 1 with objective.token_order, which looks far ahead in the window",
        "Set objective.token_order=null",
    ),
    _needs(
        lambda recipe: recipe.objective.balance == "none",
        ("objective.balance",),
        "must be 1 with objective.balance=rms: a slice has another RMS than its window",
        "Set objective.balance=none",
    ),
    _needs(
        lambda recipe: recipe.data.kind == "shards",
        ("data.kind",),
        "must be 1 for a stream: ranks that share a window must read the same rows, which a stream does not number",
        "Build shards with `mtp data build`",
    ),
)
