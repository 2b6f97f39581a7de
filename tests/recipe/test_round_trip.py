"""A recipe written out loads as an equal one, with an equal hash."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from mtp_lightning.recipe import Recipe, diff_recipes, load_recipe, recipe_hash, recipe_to_yaml
from mtp_lightning.recipe.diff import leaves
from mtp_lightning.recipe.loading.parse import read_yaml
from tests.recipe.any_recipe import recipes

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 10


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_resolved_recipe_is_a_recipe_and_takes_the_overrides_of_every_run(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path).recipe
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    again = load_recipe(resolved)
    assert again.recipe == recipe
    assert recipe_hash(again.recipe) == recipe_hash(recipe)
    assert diff_recipes(again.recipe, recipe) == []
    assert recipe_to_yaml(again.recipe) == recipe_to_yaml(recipe)
    assert "default" not in again.origins.values()
    other = load_recipe(path, ["run.dir=elsewhere", "run.seed=7", "run.steps=5_000"]).recipe
    assert (other.run.dir, other.run.seed, other.run.steps) == ("elsewhere", 7, 5000)


def test_every_recipe_has_a_header_that_says_what_it_is_for() -> None:
    lines = {path: path.read_text(encoding="utf-8").splitlines() for path in RECIPES}
    words = ("# For: ", "# Expected: ", "# Launch: ")
    missing = [
        (str(path), word)
        for path in RECIPES
        for word in words
        if not any(line.startswith(word) for line in lines[path])
    ]
    assert missing == []


LARGE = [HealthCheck.data_too_large]  # a recipe has many fields, and each is drawn


@settings(max_examples=10, deadline=None, suppress_health_check=LARGE)
@given(recipes())
def test_any_recipe_reads_back_as_it_was(recipe: Recipe) -> None:
    assert_reads_back(recipe)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=LARGE)
@given(recipes())
def test_each_of_a_hundred_recipes_reads_back_as_it_was(recipe: Recipe) -> None:
    assert_reads_back(recipe)


def assert_reads_back(recipe: Recipe) -> None:
    text = recipe_to_yaml(recipe)
    tree = read_yaml(text, "recipe.yaml", [], where=str)
    assert tree is not None
    again = Recipe.model_validate(tree.plain())
    assert leaves(again) == leaves(recipe)
    assert again == recipe
    assert text.count("\n") == len(text.split("\n")) - 1


def test_what_a_model_of_transformers_does_not_read_is_not_written(tmp_path: Path) -> None:
    """Its default would say what is not so: `rope_theta: 10000.0` beside settings that say otherwise."""
    settings = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"vocab_size": 16, "rope_theta": 100000.0}
    model = {"family": "transformers", "hf_config": settings}
    recipe = Recipe.model_validate({"model": model, "heads": {"layers_from_trunk": False}})
    text = recipe_to_yaml(recipe)
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    assert text.count("rope_theta") == 1
    assert "norm: rms" not in text
    assert load_recipe(tmp_path / "recipe.yaml").recipe == recipe
