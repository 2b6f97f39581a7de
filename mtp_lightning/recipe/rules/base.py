"""A condition on a recipe, and what its message needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mtp_lightning.recipe.schema.describe import one_of
from mtp_lightning.recipe.schema.root import Recipe

LARGEST_DIVISOR = 1024


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A condition on one or several fields; the fault is reported at the first."""

    fields: tuple[str, ...]
    holds: Callable[[Recipe], bool]
    expected: str
    hint: str | Callable[[Recipe], str]


def value_at(recipe: Recipe, field: str) -> Any:
    """Return the value of a field by its dotted path.

    >>> value_at(Recipe(), "heads.num_offsets")
    4
    """
    value: Any = recipe
    for name in field.split("."):
        value = getattr(value, name, None)
    return value


def divisors(number: int) -> str:
    """List numbers that divide a number, the largest last.

    >>> divisors(6)
    '1, 2, 3 or 6'
    """
    return one_of([str(d) for d in range(1, min(number, LARGEST_DIVISOR) + 1) if number % d == 0][-8:])
