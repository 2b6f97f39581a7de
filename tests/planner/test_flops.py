"""Operations of a step, against published shapes and hand counts."""

import pytest

from mtp_lightning.planner.flops import attention_flops_per_position, flop_ratio, flops_per_position, flops_per_step
from mtp_lightning.recipe.schema.root import Recipe

PAPER_SHAPES = {"1.3B": (2048, 24, 16), "6.7B": (4096, 32, 32), "13B": (5120, 40, 40)}


def paper_recipe(size, seq_len):
    width, num_layers, num_heads = PAPER_SHAPES[size]
    model = {
        "hidden_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "vocab_size": 32_000,
    }
    return Recipe.model_validate({"model": model, "data": {"seq_len": seq_len}})


@pytest.mark.parametrize(("size", "floor"), [("1.3B", 1.15), ("6.7B", 1.06), ("13B", 1.04)])
def test_floor_of_four_offsets_by_matrices(size, floor):
    """At short windows attention costs nothing and the floor is that of the parameters alone."""
    assert flop_ratio(paper_recipe(size, 16), 4) == pytest.approx(floor, abs=0.005)


@pytest.mark.parametrize(("size", "floor"), [("1.3B", 1.117), ("6.7B", 1.051), ("13B", 1.034)])
def test_floor_of_four_offsets_at_the_papers_window(size, floor):
    assert flop_ratio(paper_recipe(size, 4096), 4) == pytest.approx(floor, abs=0.002)


def test_matched_parameters_add_only_the_unembedding():
    recipe = paper_recipe("1.3B", 4096)
    assert flop_ratio(recipe, 1) == 1
    one = flops_per_position(recipe) / flop_ratio(recipe, 4)
    assert flops_per_position(recipe) - one == pytest.approx(6 * 3 * 32_000 * 2048)


def test_recursive_module_counts_every_unrolling():
    recipe = Recipe.model_validate({"heads": {"kind": "recursive", "num_offsets": 4}})
    assert attention_flops_per_position(recipe) == 12 * (7 + 3) * 256 * 256


def test_published_convention():
    """[llm-foundry] 13B on 8 H100: 4,717 tokens/s per GPU at T = 4096 is 41.6% of 989 TFLOP/s."""
    mfu = 4717 * (6 * 12_864_440_320 + 12 * 40 * 5120 * 4096) / 989e12
    assert mfu == pytest.approx(0.416, abs=0.001)
    recipe = paper_recipe("13B", 4096)
    assert attention_flops_per_position(recipe) == 12 * 40 * 5120 * 4096


def test_step_counts_every_row():
    recipe = Recipe.model_validate({"batch": {"global_batch_size": 6, "micro_batch_size": 2}, "data": {"seq_len": 32}})
    assert flops_per_step(recipe) == 6 * 32 * flops_per_position(recipe)
