"""Recipes with another number of offsets."""

from mtp_lightning.planner.counts import parameter_counts
from mtp_lightning.planner.layout import obstacle, with_backward_order, with_offsets
from mtp_lightning.recipe.schema.root import Recipe


def test_every_offset_gets_a_weight():
    recipe = Recipe.model_validate({"objective": {"weights": {"kind": "constant", "values": [1.0, 0.5, 0.0, 0.0]}}})
    assert obstacle(with_offsets(recipe, 7)) is None
    assert with_offsets(recipe, 2).objective.weights.values is None


def test_matched_parameters_stay():
    assert parameter_counts(with_offsets(Recipe(), 7)).total == parameter_counts(Recipe()).total


def test_obstacle_names_what_is_in_the_way():
    fault = obstacle(with_offsets(Recipe(), 8))
    assert fault is not None
    assert fault.path == "model.num_hidden_layers"


def test_schedule_changes_nothing_else():
    recipe = with_backward_order(Recipe(), "bridged")
    assert recipe.objective.backward_order == "bridged"
    assert recipe.model == Recipe().model
