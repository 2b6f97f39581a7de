"""The tree of heads: which state each offset reads, and through which norm. Model and planner both ask here.

parallel, linear, medusa            chained causal, sequential, recursive     chained anticausal

trunk -> 1                          trunk -> 1 -> 2 -> ... -> n               trunk -> n -> ... -> 2 -> 1
      -> 2                          (1 is the trunk's output itself in
      ...                            sequential and recursive heads)
      -> n
"""

from mtp_lightning.recipe.head_kinds import registered
from mtp_lightning.recipe.schema.model import HeadsSection

TRUNK = 0  # the trunk's output stands in the place of an offset where heads name what they read


def parent_offset(heads: HeadsSection, offset: int) -> int:
    """Return the offset whose state this one reads, or `TRUNK`.

    >>> chain = HeadsSection(kind="chained", order="anticausal", num_offsets=4)
    >>> [parent_offset(chain, offset) for offset in (1, 2, 3, 4)]
    [2, 3, 4, 0]
    """
    if (own := registered(heads.kind)) is not None:
        return own.parent(heads, offset)
    if heads.kind in ("parallel", "linear", "medusa"):
        return TRUNK
    if (heads.kind, heads.order) == ("chained", "anticausal"):
        return TRUNK if offset == heads.num_offsets else offset + 1
    return offset - 1


def norm_before(heads: HeadsSection, offset: int) -> int | None:
    """Return the offset whose final norm a state passes before this offset reads it; None for no norm.

    >>> norm_before(HeadsSection(kind="medusa"), 3), norm_before(HeadsSection(kind="parallel"), 3)
    (1, None)
    """
    if offset == 1:
        return None
    if heads.kind == "medusa":
        return 1
    return offset - 1 if heads.kind in ("sequential", "recursive") and heads.hidden == "post_norm" else None


def has_final_norm(heads: HeadsSection, offset: int) -> bool:
    """Return whether this offset's state passes a final norm before the unembedding."""
    return offset == 1 or heads.kind != "medusa"


def detaches_input(heads: HeadsSection, offset: int, parent: int) -> bool:
    """Return whether this offset's gradients stop before the state that it reads (`heads.detach_trunk`)."""
    return heads.detach_trunk and offset > 1 and parent in (TRUNK, 1)
