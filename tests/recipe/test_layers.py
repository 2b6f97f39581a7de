"""Who owns the layers."""

import pytest

from mtp_lightning.recipe import Recipe, num_head_layers, num_trunk_layers


def recipe_with(**heads: object) -> Recipe:
    """A recipe of twelve layers with these heads."""
    return Recipe.model_validate({"model": {"num_hidden_layers": 12}, "heads": heads})


@pytest.mark.parametrize(
    ("kind", "of_one", "of_four", "of_four_unmatched"),
    [
        ("parallel", (11, 1), (8, 4), (11, 4)),
        ("chained", (11, 1), (8, 4), (11, 4)),
        ("sequential", (12, 0), (9, 3), (12, 3)),
        ("recursive", (12, 0), (11, 1), (12, 1)),
        ("linear", (12, 0), (12, 0), (12, 0)),
        ("medusa", (12, 0), (12, 0), (12, 0)),
    ],
)
def test_layers_of_trunk_and_heads(
    kind: str, of_one: tuple[int, int], of_four: tuple[int, int], of_four_unmatched: tuple[int, int]
) -> None:
    found = [
        (num_trunk_layers(recipe), num_head_layers(recipe))
        for recipe in (
            recipe_with(kind=kind, num_offsets=1),
            recipe_with(kind=kind, num_offsets=4),
            recipe_with(kind=kind, num_offsets=4, layers_from_trunk=False),
        )
    ]
    assert found == [of_one, of_four, of_four_unmatched]


@pytest.mark.parametrize("kind", ["parallel", "chained", "sequential", "recursive"])
@pytest.mark.parametrize("num_offsets", [1, 2, 4])
@pytest.mark.parametrize("layers_per_head", [1, 2])
def test_matched_parameters_keep_the_number_of_layers(kind: str, num_offsets: int, layers_per_head: int) -> None:
    recipe = recipe_with(kind=kind, num_offsets=num_offsets, layers_per_head=layers_per_head)
    assert num_trunk_layers(recipe) + num_head_layers(recipe) == 12
