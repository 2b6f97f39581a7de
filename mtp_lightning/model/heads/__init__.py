"""Head kinds: how the hidden state of every offset is computed.

To add a kind: write a subclass of `Heads` in a file of its own and register it; docs/develop/add_a_head.md shows how.
Backward orders, checks, benchmarks and the laws run on it unchanged.
"""

from collections.abc import Callable
from typing import cast

from mtp_lightning.model.heads.base import HeadContext, Heads
from mtp_lightning.model.heads.chained import ChainedHeads
from mtp_lightning.model.heads.linear import LinearHeads
from mtp_lightning.model.heads.medusa import MedusaHeads
from mtp_lightning.model.heads.parallel import ParallelHeads
from mtp_lightning.model.heads.recursive import RecursiveHeads
from mtp_lightning.model.heads.sequential import SequentialHeads
from mtp_lightning.recipe import head_kinds
from mtp_lightning.recipe.head_tree import TRUNK

KINDS: dict[str, Callable[..., Heads]] = {
    "parallel": ParallelHeads,
    "linear": LinearHeads,
    "chained": ChainedHeads,
    "sequential": SequentialHeads,
    "recursive": RecursiveHeads,
    "medusa": MedusaHeads,
}


def register_head(name: str, kind: type[Heads]) -> None:
    """Make a kind of one's own available as `heads.kind`, in this process.

    Args:
        name: an identifier that no built-in kind has.
        kind: built as `kind(model_section, heads_section, recompute=...)`.

    Raises:
        ValueError: The name is taken by a built-in kind, or is no identifier.
    """
    head_kinds.register(name, cast(head_kinds.HeadKind, kind))


def head_class(name: str) -> Callable[..., Heads]:
    """Return the class of a kind, built-in or registered."""
    return KINDS.get(name) or cast(Callable[..., Heads], head_kinds.registered(name))


__all__ = ["KINDS", "TRUNK", "HeadContext", "Heads", "head_class", "register_head"]
