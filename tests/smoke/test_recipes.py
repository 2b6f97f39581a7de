"""Every recipe runs: shrunk in width, window and steps, its own code path goes from data to a resumed checkpoint."""

import json
import re

import pytest

from mtp_lightning.recipe import load_recipe, num_trunk_layers, recipe_to_yaml
from mtp_lightning.recipe.layer_counts import num_layers_from_trunk
from mtp_lightning.recipe.schema.model import AdaptSection
from mtp_lightning.recipe.schema.root import InitSection
from mtp_lightning.training.fit import train
from tests.support.runs import ROOT

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
SHRINK = (
    "model.hidden_size=32",
    "model.num_attention_heads=4",
    "model.intermediate_size=32",
    "data.shards=null",
    "data.workers=0",
    "data.corpus=[stdlib:json]",
    "data.validation_fraction=0.2",
    "data.seq_len=32",
    "batch.global_batch_size=4",
    "batch.micro_batch_size=2",
    "optimizer.warmup_steps=1",
    "run.validation_samples=2",
    "run.validate_every_steps=2",
    "checkpoint.every_steps=2",
    "logging.every_steps=1",
    "logging.curves=false",
    "run.device=cpu",
    "run.threads=1",
    "strategy.kind=single",
    "strategy.num_nodes=1",
    "strategy.ranks_per_node=1",
)
DEEPEST = 16


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def shrink_further(path):
    """Cut a recipe of full size to bytes, and to the layers that its heads need and one more."""
    recipe = load_recipe(path).recipe
    own = (
        ["data.tokenizer=byte", "model.vocab_size=257"] if "probes/induction" in str(path) else []
    )  # its tokenizer comes with its data
    if recipe.model.num_hidden_layers <= DEEPEST:
        return own
    return [*own, "model.vocab_size=257", f"model.num_hidden_layers={recipe.heads.num_offsets + 1}"]


def start_overrides(path, overrides, folder):
    """Train the model that a recipe starts from, nothing of it adapted, for a step, where it starts from one."""
    recipe = load_recipe(path, overrides).recipe
    if recipe.init.path is None:
        return []
    run = recipe.run.model_copy(update={"steps": 1, "dir": str(folder / "start")})
    bare = {"adapt": AdaptSection(), "freeze": [], "phases": {}, "init": InitSection(), "run": run}
    if path.stem.endswith("4to1"):  # further heads are dropped
        bare["heads"] = recipe.heads.model_copy(update={"num_offsets": 4})
        layers = num_trunk_layers(recipe) + num_layers_from_trunk(recipe.model_copy(update=bare))
        bare["model"] = recipe.model.model_copy(update={"num_hidden_layers": layers})
    bare["health"] = recipe.health.model_copy(update={"drift": None})
    (folder / "start.yaml").write_text(recipe_to_yaml(recipe.model_copy(update=bare)))
    if not (folder / "start").exists():
        assert train(load_recipe(folder / "start.yaml", ["objective.balance=none"])) == 0
    return [f"init.path={folder}/start"]


def phase_overrides(path, steps):
    """Cut every phase to some steps."""
    names = load_recipe(path).recipe.phases
    return [f"phases.{name}.run={{steps: {steps}}}" for name in names]


def one_of_each_folder():
    """The first of every kind, but for those to debug, which other tests train; the others are slow.

    By hand run those that differ from others in width and depth alone.
    """
    names = {path: path.relative_to(ROOT / "recipes") for path in RECIPES}
    firsts = {names[path].parts[0]: path for path in reversed(RECIPES) if names[path].parts[0] != "debug"}.values()
    for path in RECIPES:
        name = str(names[path])
        others = pytest.mark.matrix if re.match(r"paper/(0\.6|1\.3|3|6\.7)b_n", name) else pytest.mark.slow
        yield pytest.param(path, id=name, marks=() if path in firsts else others)


def test_there_are_recipes():
    assert ROOT / "recipes/quickstart.yaml" in RECIPES
    assert len(RECIPES) >= 9


@pytest.mark.parametrize("path", [*one_of_each_folder()])
def test_recipe_trains_and_goes_on(path, cache, tmp_path):
    def run(steps):
        own = [f"run.steps={steps}", f"run.dir={tmp_path}/run", f"run.cache={cache}"]
        overrides = [*SHRINK, *shrink_further(path), *phase_overrides(path, steps), *own]
        overrides += start_overrides(path, overrides, tmp_path)
        assert train(load_recipe(path, overrides)) == 0
        summary = json.loads((tmp_path / "run/summary.json").read_text())
        return list(summary["phases"].values())[-1] if "phases" in summary else summary

    assert run(2)["steps"] == 2
    summary = run(3)
    assert summary["steps"] == 3
    assert summary["validation"]["loss"]["1"] > 0
