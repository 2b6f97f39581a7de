"""Covering arrays: fewer cases than a full product, in which all the same every two values meet that can."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from heapq import heapify, heapreplace
from itertools import combinations, count, product
from typing import Any

import pytest

Cells = list[tuple[Any, ...]]


def covering_array(allowed: Callable[..., bool] | None = None, **dimensions: Iterable[Any]) -> Cells:
    """Choose cells until all pairs of values have met that meet in any allowed cell."""
    return chosen(full_product(allowed, **dimensions), 2)


def drawn_array(allowed: Callable[..., bool], *, number: int, **dimensions: Iterable[Any]) -> Cells:
    """As `covering_array`, from so many cells drawn at random: for dimensions whose full product is too large."""
    draw, values = random.Random(0), [list(dimension) for dimension in dimensions.values()]
    cells = [tuple(map(draw.choice, values)) for _ in range(number)]
    return chosen([cell for cell in cells if allowed(**dict(zip(dimensions, cell, strict=True)))], 2)


def chosen(cells: Cells, number: int) -> Cells:
    """Choose until all so many values have met that meet in any of the cells: each time the one with most new ones."""
    numbers = defaultdict[Any, int](count().__next__)
    masks = [sum(1 << numbers[met] for met in combinations(enumerate(cell), number)) for cell in cells]
    missing, found = (1 << len(numbers)) - 1, []
    most_new = [(-mask.bit_count(), place) for place, mask in enumerate(masks)]  # later ones have as many at most
    heapify(most_new)
    while missing:
        at_most, place = most_new[0]
        new = (masks[place] & missing).bit_count()
        heapreplace(most_new, (-new, place))
        if new == -at_most:
            missing &= ~masks[place]
            found.append(cells[place])
    return found


def full_product(allowed: Callable[..., bool] | None = None, **dimensions: Iterable[Any]) -> Cells:
    """List every allowed combination; `allowed` takes the dimensions by name."""
    cells = list(product(*dimensions.values()))
    return [cell for cell in cells if allowed is None or allowed(**dict(zip(dimensions, cell, strict=True)))]


def every_pair(
    allowed: Callable[..., bool] | None = None,
    *,
    full: bool = False,
    one_in: int = 1,
    first: int = 0,
    **dimensions: Iterable[Any],
) -> pytest.MarkDecorator:
    """Parametrise a test: every value of each dimension every day, every pair with `-m slow`.

    With `full`, the other combinations run too, under `-m matrix`. With `one_in`, one in so many values of the first
    dimension is met every day, by every value of the others: other tests of the file meet the rest.
    """
    array = covering_array(allowed, **dimensions)
    today = {*list(next(iter(dimensions.values())))[first::one_in]}
    daily = chosen([cell for cell in array if cell[0] in today], 1)
    cells: list[Any] = [pytest.param(*cell, marks=() if cell in daily else pytest.mark.slow) for cell in array]
    if full:
        rest = [cell for cell in full_product(allowed, **dimensions) if cell not in set(array)]
        cells += [pytest.param(*cell, marks=pytest.mark.matrix) for cell in rest]
    return pytest.mark.parametrize(tuple(dimensions), cells)


def some_of(cases: Iterable[Any], *, one_in: int, first: int = 0) -> list[Any]:
    """Take one in so many cases of a table, given as tuples or names, every day; the others are slow."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [
        pytest.param(*row, marks=() if place % one_in == first else pytest.mark.slow) for place, row in enumerate(rows)
    ]
