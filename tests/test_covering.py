"""Covering arrays hold what they promise."""

from itertools import combinations

from tests.support.covering import covering_array, full_product

DIMENSIONS = {"kind": range(11), "objective": range(5), "chunk": (1, 7, 1000), "masked": (False, True)}


def allowed(**cell: int) -> bool:
    return (cell["kind"], cell["objective"]) != (3, 2)


def pairs(cells: list[tuple[int, ...]]) -> set[object]:
    return {pair for cell in cells for pair in combinations(enumerate(cell), 2)}


def test_every_two_values_meet_that_can() -> None:
    every, chosen = full_product(allowed, **DIMENSIONS), covering_array(allowed, **DIMENSIONS)
    assert pairs(chosen) == pairs(every)
    assert ((0, 3), (1, 2)) not in pairs(chosen)
    assert set(chosen) <= set(every)
    assert 11 * 5 - 1 <= len(chosen) == len(set(chosen)) < len(every) / 4
