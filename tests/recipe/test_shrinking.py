"""debug.shrink changes sizes and nothing of the code path, and what it gives is a recipe of its own."""

import pytest

from mtp_lightning.recipe import diff_recipes, load_recipe, recipe_to_yaml
from mtp_lightning.recipe.loading.phases import phases_of
from tests.support.runs import ROOT

PAPER = sorted((ROOT / "recipes/paper").glob("*.yaml"))
SIZES = ("model.", "data.", "batch.", "optimizer.warmup_steps", "run.", "checkpoint.every_steps", "logging.every_steps")


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_only_sizes_change(path):
    full, small = load_recipe(path).recipe, load_recipe(path, ["debug.shrink=true"]).recipe
    changed = [diff.path for diff in diff_recipes(full, small)]
    assert "model.hidden_size" in changed
    assert not [name for name in changed if not name.startswith(SIZES)]
    assert small.run.precision == full.run.precision


def test_what_the_command_line_sets_stays():
    overrides = ["debug.shrink=true", "model.hidden_size=48", "strategy.num_nodes=1", "strategy.ranks_per_node=4"]
    small = load_recipe(ROOT / "recipes/paper/13b_n4.yaml", overrides).recipe
    assert small.model.hidden_size == 48
    assert small.batch.global_batch_size == 16


def test_phases_are_shrunk_too():
    path = ROOT / "recipes/distill/extend.yaml"
    full, small = load_recipe(path).recipe, load_recipe(path, ["debug.shrink=true", "phases.four.run.steps=7"]).recipe
    assert [phase.extend_to for phase in small.phases.values()] == [phase.extend_to for phase in full.phases.values()]
    assert small.data.seq_len > 17
    assert [phase.recipe.run.steps for phase in phases_of(small)] == [20, 7, 20, 20]


def test_a_shrunk_recipe_is_whole_in_itself(tmp_path):
    small = load_recipe(ROOT / "recipes/paper/13b_n4.yaml", ["debug.shrink=true", "model.hidden_size=48"]).recipe
    (tmp_path / "recipe.yaml").write_text(recipe_to_yaml(small))
    assert load_recipe(tmp_path / "recipe.yaml").recipe == small
