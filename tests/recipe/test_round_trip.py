"""A recipe written out loads as an equal one, with an equal hash."""

from pathlib import Path

import pytest
from hypothesis import given, settings

from mtp_lightning.recipe import Recipe, diff_recipes, load_recipe, recipe_hash, recipe_to_yaml
from mtp_lightning.recipe.diff import leaves
from mtp_lightning.recipe.loading.parse import read_yaml
from tests.recipe.any_recipe import recipes

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 10


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_resolved_recipe_is_a_recipe(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path).recipe
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    again = load_recipe(resolved)
    assert again.recipe == recipe
    assert recipe_hash(again.recipe) == recipe_hash(recipe)
    assert diff_recipes(again.recipe, recipe) == []
    assert recipe_to_yaml(again.recipe) == recipe_to_yaml(recipe)
    assert "default" not in again.origins.values()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_has_a_header_that_says_what_it_is_for(path: Path) -> None:
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert all(any(line.startswith(f"# {word}") for line in header) for word in ("For: ", "Expected: ", "Launch: "))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_takes_the_overrides_of_every_run(path: Path) -> None:
    recipe = load_recipe(path, ["run.dir=elsewhere", "run.seed=7", "run.steps=5_000"]).recipe
    assert (recipe.run.dir, recipe.run.seed, recipe.run.steps) == ("elsewhere", 7, 5000)


@settings(max_examples=50, deadline=None)
@given(recipes())
def test_any_recipe_reads_back_as_it_was(recipe: Recipe) -> None:
    text = recipe_to_yaml(recipe)
    tree = read_yaml(text, "recipe.yaml", [], where=str)
    assert tree is not None
    again = Recipe.model_validate(tree.plain())
    assert leaves(again) == leaves(recipe)
    assert again == recipe
    assert text.count("\n") == len(text.split("\n")) - 1
