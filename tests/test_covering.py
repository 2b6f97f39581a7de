"""Covering arrays hold what they promise."""

from itertools import combinations

from tests.support.covering import chosen, covering_array, every_pair, full_product

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


def test_every_value_is_met_every_day_and_nothing_is_left_out() -> None:
    daily = chosen(covering_array(allowed, **DIMENSIONS), 1)
    assert {value for cell in daily for value in enumerate(cell)} == {
        (place, value) for place, values in enumerate(DIMENSIONS.values()) for value in values
    }
    assert len(daily) == 11
    cells = every_pair(allowed, full=True, **DIMENSIONS).args[1]
    by_mark = {mark: {tuple(cell.values) for cell in cells if mark in str(cell.marks)} for mark in ("slow", "matrix")}
    assert {tuple(cell.values) for cell in cells if not cell.marks} == set(daily)
    assert by_mark["slow"] | set(daily) == set(covering_array(allowed, **DIMENSIONS))
    assert by_mark["slow"] | set(daily) | by_mark["matrix"] == set(full_product(allowed, **DIMENSIONS))
    assert len(cells) == len(full_product(allowed, **DIMENSIONS))
