"""Memory saved by computing twice, tile by tile or with inputs on the host: the gradients are those without."""

from dataclasses import replace

import pytest
import torch

from mtp_lightning.planner.layout import layout_of
from mtp_lightning.planner.memory import memory
from mtp_lightning.planner.shape import shape_of
from mtp_lightning.recipe.schema.root import Recipe
from tests.support.covering import every_pair
from tests.support.live_tensors import count_schedule
from tests.support.tiny import HEAD_KINDS, NEOX, gradients_of, relative_error, tiny_model, tiny_recipe, tiny_rows

ADAPTED = {"none": {}, "updated": {"adapt": {"lora": {"rank": 2, "dropout": 0.3, "targets": ["up", "q"]}}}}
SET_RNG_STATE = torch.random.set_rng_state
MEMORY = {
    "tiles": {"mlp_tile": 4},
    "recomputed tiles": {"mlp_tile": 2, "recompute_trunk": True, "recompute_heads": True},
    "host": {"offload_activations": True, "recompute_trunk": True},
    "tiles, host": {"mlp_tile": 5, "offload_activations": True, "recompute_trunk": True, "recompute_heads": True},
}


@every_pair(
    kind=HEAD_KINDS,
    saving=MEMORY,
    backward_order=["sequential", "bridged", "joint"],
    model=["llama", "neox"],
    adapted=ADAPTED,
    full=False,
)
def test_gradients_are_those_without(kind, saving, backward_order, model, adapted):
    found = []
    for own in ({}, MEMORY[saving]):
        recipe = tiny_recipe(
            heads=HEAD_KINDS[kind] | {"layers_from_trunk": False},
            model=NEOX if model == "neox" else {},
            memory=own,
            objective={"backward_order": backward_order},
            **ADAPTED[adapted],
        )
        torch.manual_seed(0)
        built = tiny_model(recipe).train(not recipe.adapt.lora)  # what is dropped is drawn in another order
        found.append(gradients_of(built, recipe, tiny_rows(recipe, 2)))
    (losses, plain), (again, saved) = found
    for own, other in zip(losses, again, strict=True):
        torch.testing.assert_close(own.nll_sums, other.nll_sums, rtol=1e-12, atol=0, equal_nan=True)
    assert plain.keys() == saved.keys() != set()
    assert max(relative_error(saved[name], plain[name]) for name in plain) <= 1e-10


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_that_are_run_again_draw_the_same_again_and_read_no_generator_where_none_draws(dropout, monkeypatch):
    read = []
    monkeypatch.setattr(torch.random, "set_rng_state", lambda state: (read.append(0), SET_RNG_STATE(state)))
    monkeypatch.setattr(torch, "set_rng_state", torch.random.set_rng_state)
    found = []
    for again in (False, True):
        adapt = {"lora": {"rank": 2, "dropout": dropout, "targets": ["up", "q"]}}
        recipe = tiny_recipe(memory={"recompute_trunk": again}, heads={"kind": "linear"}, adapt=adapt)
        model = tiny_model(recipe).train()
        torch.manual_seed(0)
        found.append(gradients_of(model, recipe, tiny_rows(recipe, 2))[1])
    assert bool(read) == bool(dropout)
    plain, saved = found
    assert max(relative_error(saved[name], plain[name]) for name in plain) <= 1e-10


POSITIONS, WIDTH, INNER, TILE = 512, 64, 1024, 32
LONG = {
    "model": {
        "hidden_size": WIDTH,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "intermediate_size": INNER,
        "vocab_size": 32,
    },
    "heads": {"num_offsets": 2},
    "data": {"seq_len": POSITIONS},
    "batch": {"global_batch_size": 1, "micro_batch_size": 1},
    "run": {"device": "cpu", "threads": 1},
}


def peaks_bytes(**memory_fields):
    """As counted, and as planned."""
    recipe = Recipe.model_validate(LONG | {"memory": memory_fields})
    live, _ = count_schedule(recipe)
    planned = memory(shape_of(recipe), layout_of(recipe))
    return live.peak_bytes, planned.total - planned.overhead - planned.weights - planned.optimizer


@pytest.mark.slow
def test_of_a_feed_forward_s_inner_states_one_tile_exists_at_once_as_planned():
    whole, planned = peaks_bytes()
    tiled, planned_tiled = peaks_bytes(mlp_tile=TILE)
    states_bytes = 4 * POSITIONS * INNER * 4  # of one layer: both projections, silu, product
    assert whole - tiled > 3 * states_bytes
    assert tiled <= planned_tiled <= 1.25 * tiled
    assert whole == pytest.approx(planned, rel=0.1)
    recomputed, again = peaks_bytes(recompute_trunk=True)[0], peaks_bytes(recompute_trunk=True, mlp_tile=TILE)[0]
    assert recomputed - again > states_bytes


def test_the_plan_puts_inputs_of_recomputed_layers_on_the_host():
    recipe = Recipe.model_validate(LONG | {"memory": {"recompute_trunk": True, "offload_activations": True}})
    shape, layout = shape_of(recipe), layout_of(recipe)
    here, there = memory(shape, replace(layout, offloads_activations=False)), memory(shape, layout)
    inputs_bytes = 3 * 4 * POSITIONS * WIDTH  # three layers of the trunk
    assert there.offloaded - here.offloaded == inputs_bytes == here.trunk_activations - there.trunk_activations
