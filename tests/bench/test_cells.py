"""Which recipes a benchmark measures."""

import pytest

from mtp_lightning.bench.training.cells import build_cells, describe_matching, impossible
from tests.bench.shapes import quick_recipe


def test_numbers_of_offsets_that_leave_no_trunk_are_explained():
    grid = build_cells(quick_recipe(), [1, 4, 8], ["sequential", "joint"])
    assert [cell.num_offsets for cell in grid if cell.obstacle is None] == [1, 1]
    table_notes = impossible(grid)
    assert [remark.split()[0] for remark in table_notes] == ["n=4", "n=8"]
    assert "model.num_hidden_layers must leave at least one layer to the trunk" in table_notes[0]
    assert "raise model.num_hidden_layers to 5 or more" in table_notes[0]


def test_a_window_shorter_than_the_offsets_is_explained():
    grid = build_cells(quick_recipe(kind="linear"), [16], ["sequential"])
    assert "T > n" in impossible(grid)[0]


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        ({}, "Equal total layers"),
        ({"layers_from_trunk": False}, "NOT at equal total layers"),
        ({"kind": "medusa"}, "the trunk has 4 at every n"),
    ],
)
def test_matching_is_said(heads, said):
    assert said in describe_matching(quick_recipe(**heads))
