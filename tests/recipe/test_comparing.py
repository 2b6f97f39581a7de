"""What differs between two recipes, and what that means for a run that is continued."""

from typing import Any

import pytest

from mtp_lightning.recipe import RUN_FIELDS, Recipe, changed_fields, diff_recipes, recipe_hash
from mtp_lightning.recipe.diff import NOTED, FieldDiff, leaves

DEFAULT = Recipe()


def changed(path: str, value: Any, recipe: Any = DEFAULT) -> Any:
    """Copy a recipe with another value at a path."""
    name, _, rest = path.partition(".")
    return recipe.model_copy(update={name: changed(rest, value, getattr(recipe, name)) if rest else value})


def test_every_field_counts_or_is_named_as_free() -> None:
    others = {path: changed(path, 2000 if path == "run.steps" else "another") for path in leaves(DEFAULT)}
    differing = {path: [diff.path for diff in diff_recipes(DEFAULT, other)] for path, other in others.items()}
    assert differing == {path: [path] for path in others}
    free = {path for path, other in others.items() if recipe_hash(other) == recipe_hash(DEFAULT)}
    assert free == RUN_FIELDS & others.keys()
    counting = {path: [change.path for change in changed_fields(DEFAULT, other)] for path, other in others.items()}
    assert counting == {path: [] if path in free else [path] for path in others}


@pytest.mark.parametrize("names", [RUN_FIELDS, NOTED.keys()])
def test_fields_with_a_rule_of_their_own_exist(names: Any) -> None:
    guarded = Recipe.model_validate({"run": {"early_stop": {}}, "health": {"drift": {}}})
    assert set(names) <= leaves(DEFAULT).keys() | leaves(guarded).keys()


def test_hash_counts_what_it_is_not_told_to_ignore() -> None:
    other = changed("run.dir", "elsewhere")
    assert recipe_hash(other) == recipe_hash(DEFAULT)
    assert recipe_hash(other, ignore=()) != recipe_hash(DEFAULT, ignore=())
    assert len(recipe_hash(other)) == 64


def test_longer_run_warns_and_shorter_run_is_refused() -> None:
    longer, shorter = (changed_fields(DEFAULT, changed("run.steps", steps))[0] for steps in (2000, 500))
    assert (longer.verdict, shorter.verdict) == ("warn", "refuse")
    assert str(longer).startswith("run.steps: 1000 -> 2000 (")
    assert "learning rate" in longer.reason


def test_another_model_is_refused_and_another_order_of_sums_is_not() -> None:
    other = changed("batch.micro_batch_size", 4, changed("model.hidden_size", 128))
    assert [(change.path, change.verdict) for change in changed_fields(DEFAULT, other)] == [
        ("model.hidden_size", "refuse"),
        ("batch.micro_batch_size", "warn"),
    ]


def test_sections_of_different_kinds_differ_as_a_whole() -> None:
    other = Recipe.model_validate({"objective": {"weights": {"kind": "decay"}, "token_order": {}}})
    assert diff_recipes(DEFAULT, other) == [
        FieldDiff(
            "objective.weights", {"kind": "constant", "values": None}, {"kind": "decay", "beta": 0.8, "total": None}
        ),
        FieldDiff("objective.token_order", None, {"weight": 1.0, "window_size": 256}),
    ]
    assert [change.verdict for change in changed_fields(DEFAULT, other)] == ["refuse", "refuse"]
