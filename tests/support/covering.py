"""Covering arrays: fewer cases than a full product, in which all the same every two values meet that can."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import combinations, count, product
from typing import Any

import pytest

Cells = list[tuple[Any, ...]]


def covering_array(allowed: Callable[..., bool] | None = None, **dimensions: Iterable[Any]) -> Cells:
    """Choose cells until all pairs have met that meet in any allowed cell: each time the one with most new pairs."""
    cells, numbers = full_product(allowed, **dimensions), defaultdict[Any, int](count().__next__)
    masks = {cell: sum(1 << numbers[pair] for pair in combinations(enumerate(cell), 2)) for cell in cells}
    missing, chosen = (1 << len(numbers)) - 1, []
    while missing:
        best = max(masks, key=lambda cell: (masks[cell] & missing).bit_count())
        missing &= ~masks.pop(best)
        chosen.append(best)
    return chosen


def full_product(allowed: Callable[..., bool] | None = None, **dimensions: Iterable[Any]) -> Cells:
    """List every allowed combination; `allowed` takes the dimensions by name."""
    cells = list(product(*dimensions.values()))
    return [cell for cell in cells if allowed is None or allowed(**dict(zip(dimensions, cell, strict=True)))]


def every_pair(
    allowed: Callable[..., bool] | None = None,
    *,
    quick: int | None = None,
    full: bool = False,
    **dimensions: Iterable[Any],
) -> pytest.MarkDecorator:
    """Parametrise a test over a covering array.

    With `quick`, only its first so many cells, which have most pairs, run without `-m slow`; with `full`, the other
    combinations run too, under `-m matrix`.
    """
    array = covering_array(allowed, **dimensions)
    number = len(array) if quick is None else quick
    cells: list[Any] = array[:number] + [pytest.param(*cell, marks=pytest.mark.slow) for cell in array[number:]]
    if full:
        rest = [cell for cell in full_product(allowed, **dimensions) if cell not in set(array)]
        cells += [pytest.param(*cell, marks=pytest.mark.matrix) for cell in rest]
    return pytest.mark.parametrize(tuple(dimensions), cells)
