"""Files, parents and the command line: what overlays what, and where each value came from."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from mtp_lightning.errors import RecipeError
from mtp_lightning.recipe import Recipe, load_recipe
from mtp_lightning.recipe.diff import leaves
from mtp_lightning.recipe.loading.parse import parse_yaml
from mtp_lightning.recipe.schema.objective import ConstantWeights, DecayWeights

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write files into the current folder and return the name of the last."""
    monkeypatch.chdir(tmp_path)

    def write_files(**files: str) -> str:
        for name, text in files.items():
            Path(f"{name}.yaml").write_text(text, encoding="utf-8")
        return f"{name}.yaml"

    return write_files


def test_defaults_hold_where_nothing_is_written(write: Write) -> None:
    assert load_recipe(write(a="name: default\n")).recipe == Recipe()


def test_child_overlays_its_parent_field_by_field(write: Write) -> None:
    base = "model: {hidden_size: 64, num_hidden_layers: 6}\ndata: {corpus: [a, b]}\n"
    child = "extends: base.yaml\nmodel: {hidden_size: 32}\ndata: {corpus: [c]}\n"
    recipe = load_recipe(write(base=base, child=child)).recipe
    assert (recipe.model.hidden_size, recipe.model.num_hidden_layers, recipe.data.corpus) == (32, 6, ["c"])


def test_parent_may_have_a_parent_in_another_folder(write: Write) -> None:
    Path("deep").mkdir()
    write(root="run: {seed: 3, steps: 200}\n")
    Path("deep/base.yaml").write_text("extends: ../root.yaml\nrun: {seed: 4}\n", encoding="utf-8")
    loaded = load_recipe(write(child="extends: deep/base.yaml\nname: child\n"))
    assert (loaded.recipe.run.seed, loaded.recipe.run.steps) == (4, 200)
    assert loaded.origins["run.seed"] == "deep/base.yaml:2"
    assert loaded.origins["run.steps"] == "root.yaml:1"


def test_another_kind_replaces_the_mapping(write: Write) -> None:
    base = "objective: {weights: {kind: constant, values: [1, 1, 1, 1]}}\n"
    child = "extends: base.yaml\nobjective: {weights: {kind: decay, beta: 0.5}}\n"
    assert load_recipe(write(base=base, child=child)).recipe.objective.weights == DecayWeights(kind="decay", beta=0.5)


def test_the_same_kind_merges(write: Write) -> None:
    base = "objective: {weights: {kind: decay, beta: 0.5}}\n"
    child = "extends: base.yaml\nobjective: {weights: {total: 1}}\n"
    weights = load_recipe(write(base=base, child=child)).recipe.objective.weights
    assert weights == DecayWeights(kind="decay", beta=0.5, total=1.0)


def test_another_head_kind_keeps_the_other_fields_of_heads(write: Write) -> None:
    name = write(base="heads: {kind: parallel, num_offsets: 2}\n", child="extends: base.yaml\nheads: {kind: linear}\n")
    heads = load_recipe(name, ["heads.kind=medusa"]).recipe.heads
    assert (heads.kind, heads.num_offsets) == ("medusa", 2)


def test_overrides_of_one_union_do_not_depend_on_their_order(write: Write) -> None:
    name = write(a="objective: {weights: {kind: constant, values: [1, 1, 1, 1]}}\n")
    overrides = ["objective.weights.beta=0.5", "objective.weights.kind=decay"]
    recipes = [load_recipe(name, order).recipe for order in (overrides, overrides[::-1])]
    assert recipes[0] == recipes[1]
    assert recipes[0].objective.weights == DecayWeights(kind="decay", beta=0.5)


def test_null_takes_back_what_the_parent_set(write: Write) -> None:
    base = "objective: {token_order: {weight: 2}}\noptimizer: {max_grad_norm: 2}\n"
    child = "extends: base.yaml\nobjective: {token_order: null}\n"
    recipe = load_recipe(write(base=base, child=child), ["optimizer.max_grad_norm=null"]).recipe
    assert recipe.objective.token_order is None
    assert recipe.optimizer.max_grad_norm is None


def test_later_override_holds(write: Write) -> None:
    assert load_recipe(write(a="name: a\n"), ["run.seed=1", "run.seed=2"]).recipe.run.seed == 2


def test_another_recipe_is_laid_over_before_fields(write: Write) -> None:
    name = (
        write(
            own="name: own\nmodel: {hidden_size: 64}\nrun: {steps: 5, seed: 3}\n",
            parent="run: {steps: 7}\nobjective: {weights: {kind: decay}}\n",
            other="extends: parent.yaml\nname: other\nrun: {validation_samples: 3}\n",
        )
        .replace("other", "own")
        .replace("parent", "own")
    )
    other = name.replace("own", "other")
    loaded = load_recipe(name, ["run.validation_samples=4", other])
    recipe = loaded.recipe
    assert (recipe.name, recipe.model.hidden_size) == ("other", 64)
    assert (recipe.run.steps, recipe.run.seed, recipe.run.validation_samples) == (7, 3, 4)
    assert isinstance(recipe.objective.weights, DecayWeights)
    assert loaded.origins["run.steps"] == f"{other.replace('other', 'parent')}:1"
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, ["nothing.yaml"])
    assert "must be a recipe" in caught.value.faults[0].expected


def test_overrides_take_lists_and_mappings(write: Write) -> None:
    overrides = ["data.corpus=[src, docs]", "optimizer.lr_scale={heads: 4}", "model={hidden_size: 64}"]
    recipe = load_recipe(write(a="model: {num_hidden_layers: 6}\n"), overrides).recipe
    assert recipe.data.corpus == ["src", "docs"]
    assert recipe.optimizer.lr_scale == {"heads": 4.0}
    assert (recipe.model.hidden_size, recipe.model.num_hidden_layers) == (64, 6)


def test_whole_numbers_may_be_written_as_floats(write: Write) -> None:
    recipe = load_recipe(write(a="run: {steps: 1e6}\noptimizer: {lr: 1}\n")).recipe
    assert (recipe.run.steps, type(recipe.run.steps)) == (1_000_000, int)
    assert (recipe.optimizer.lr, type(recipe.optimizer.lr)) == (1.0, float)


def test_every_field_has_an_origin(write: Write) -> None:
    base = "optimizer:\n  lr_scale:\n    trunk: 1\nrun: &run\n  seed: 1\n"
    child = "# header\nextends: base.yaml\n\noptimizer:\n  lr_scale: {heads: 4}\n\ndata:\n  corpus:\n    - a\n    - b\n"
    loaded = load_recipe(write(base=base, child=child), ["heads.num_offsets=2"])
    assert loaded.origins.keys() == leaves(loaded.recipe).keys()
    written = {path: origin for path, origin in loaded.origins.items() if origin != "default"}
    assert written == {
        "heads.num_offsets": "command line",
        "data.corpus": "child.yaml:8",
        "optimizer.lr_scale": "base.yaml:3, child.yaml:5",
        "run.seed": "base.yaml:5",
    }


MERGES = (
    "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  y: 3\n",
    "a: &a {x: 1}\nb: {y: 3, <<: *a}\n",
    "a: &a {x: 1}\nc: &c {x: 2, z: 5}\nb:\n  <<: [*a, *c]\n",
    "a: &a {x: {p: 1, q: 2}}\nb:\n  <<: *a\n  x: {q: 3}\n",
    "a: &a {x: 1}\nb: &b\n  <<: *a\n  y: 2\nc: {<<: *b, z: 3}\n",
)


@pytest.mark.parametrize("text", MERGES)
def test_merge_keys_are_read_as_by_the_library(text: str) -> None:
    assert parse_yaml(text) == YAML(typ="safe", pure=True).load(text)


def test_aliases_are_read(write: Write) -> None:
    recipe = load_recipe(write(a="batch:\n  global_batch_size: &rows 32\n  micro_batch_size: *rows\n")).recipe
    assert (recipe.batch.global_batch_size, recipe.batch.micro_batch_size) == (32, 32)


def test_default_union_needs_no_mention(write: Write) -> None:
    assert load_recipe(write(a="objective: {z_loss: 0.1}\n")).recipe.objective.weights == ConstantWeights()


def test_rules_pass_over_fields_in_doubt(write: Write) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(a="heads:\n  num_offsets: 300\n  layers_from_trunk: false\ndata:\n  seq_lne: 512\n"))
    assert [fault.path for fault in caught.value.faults] == ["data.seq_lne"]


WORDS = (
    "model",
    "heads",
    "run",
    "steps",
    "kind",
    "weights",
    "extends",
    "null",
    "true",
    "1e3",
    "é",
    "<<",
    "!!",
    "&a",
    "*a",
)
FRAGMENTS = st.sampled_from([*WORDS, *"!%@=?|>#[]{},:*&\t\x07\n'\"", ": ", "\n  ", "- "])
TEXTS = st.lists(FRAGMENTS, max_size=25).map("".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(text=TEXTS, overrides=st.lists(TEXTS, max_size=2))
def test_any_text_is_a_recipe_or_has_faults(text: str, overrides: list[str], write: Write) -> None:
    name = write(a="name: a\n")
    Path(name).write_text(text, encoding="utf-8")
    try:
        loaded = load_recipe(name, overrides)
    except RecipeError as error:
        assert error.faults  # noqa: PT017
    else:
        assert isinstance(loaded.recipe, Recipe)
