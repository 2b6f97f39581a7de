"""The head kind of docs/develop/add_a_head.md: one file, at most 80 lines, and everything runs on it."""

import importlib.metadata
import sys
import types

import pytest

from mtp_lightning.decode import generate
from mtp_lightning.diagnostics.head_kind import check_head_kind
from mtp_lightning.errors import RecipeError, TrainingError
from mtp_lightning.model.heads import Heads, register_head
from mtp_lightning.model.mtp_model import build_model
from mtp_lightning.planner.counts import parameter_counts
from mtp_lightning.planner.flops import flops_per_position
from mtp_lightning.planner.report import build_plan
from mtp_lightning.recipe import Recipe, head_kinds, load_recipe, num_head_layers
from mtp_lightning.training.fit import train
from tests.docs.documents import ROOT, blocks
from tests.support.tiny import HEAD_KINDS

PAGE = (ROOT / "docs/develop/add_a_head.md").read_text(encoding="utf-8")
CLASS, CHECK = blocks(PAGE, "python")


@pytest.fixture(autouse=True)
def only_here(monkeypatch):
    """Kinds that a test registers are gone after it."""
    monkeypatch.setattr(head_kinds, "_registered", {})


@pytest.fixture
def gated():
    """The class of the page."""
    module = types.ModuleType("page")
    exec(compile(CLASS, "add_a_head.md", "exec"), vars(module))
    return module.GatedHeads


def load(*overrides):
    return load_recipe(ROOT / "recipes/debug/parallel.yaml", ["heads.kind=gated", *overrides]).recipe


def test_the_page_is_short_enough():
    assert len(CLASS.splitlines()) <= 80


def test_the_page_checks_its_kind(gated):
    exec(compile(CHECK, "add_a_head.md", "exec"), {})


@pytest.mark.parametrize("kind", sorted({section["kind"] for section in HEAD_KINDS.values()}))
def test_the_check_passes_every_kind_of_the_package(kind):
    check_head_kind(kind, num_offsets=3)


def test_recipe_planner_and_model_agree_on_it(gated):
    recipe = load("heads.layers_per_head=1")
    assert num_head_layers(recipe) == recipe.heads.num_offsets - 1
    model = build_model(recipe)
    assert parameter_counts(recipe).total == sum(p.numel() for p in model.parameters())
    maps = load("heads.kind=linear")  # as many layers in all, a D x D map for each extra offset as well
    assert flops_per_position(recipe) == flops_per_position(maps)
    assert build_plan(recipe, num_gpus=1).chosen


def test_it_trains_and_decodes(gated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    overrides = ["heads.kind=gated", "run.steps=3", "run.dir=run", "run.cache=cache", "run.threads=1"]
    assert train(load_recipe(ROOT / "recipes/debug/parallel.yaml", overrides)) == 0
    from mtp_lightning import load_model

    loaded = load_model("run")
    assert type(loaded.model.heads).__name__ == "GatedHeads"
    prompts = [list(b"def f("), list(b"import")]
    texts = [generate(loaded.model, prompts, decoder=name, max_new_tokens=9).tokens for name in ("greedy", "blockwise")]
    assert texts[0] == texts[1]


def test_an_entry_point_is_found_without_registering(gated, monkeypatch):
    head_kinds._registered.clear()
    sys.modules["page_of_heads"] = types.SimpleNamespace(GatedHeads=gated)
    point = importlib.metadata.EntryPoint("gated", "page_of_heads:GatedHeads", head_kinds.GROUP)
    monkeypatch.setattr(head_kinds, "_entry_points", lambda: {"gated": point})
    assert type(build_model(load()).heads) is gated
    del sys.modules["page_of_heads"]


def test_an_unknown_kind_is_refused_with_those_that_there_are(gated):
    with pytest.raises(RecipeError) as caught:
        load_recipe(ROOT / "recipes/debug/parallel.yaml", ["heads.kind=gatde"])
    assert caught.value.faults[0].nearest == "gated"
    assert "medusa or gated" in caught.value.faults[0].expected
    with pytest.raises(ValueError, match="free"):
        register_head("medusa", gated)
    with pytest.raises(ValueError, match="identifier"):
        register_head("my kind", gated)


def reads_tokens_in_secret(gated):
    class Broken(gated):
        def forward(self, offset, state, context):
            return super().forward(offset, state, context) + context.embedded[:, : state.shape[1]]

    return Broken


def hides_a_module(gated):
    class Broken(gated):
        def modules_of(self, offset):
            return list(super().modules_of(offset))[:1]

    return Broken


def counts_no_layers(gated):
    class Broken(gated):
        @classmethod
        def num_layers(cls, heads, offset):
            return 0

    return Broken


def looks_ahead(gated):
    class Broken(gated):
        def forward(self, offset, state, context):
            return super().forward(offset, state if offset == 1 else state.roll(-1, 1), context)

    return Broken


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (reads_tokens_in_secret, "same gradients.*in the sequential order"),
        (hides_a_module, "belong to an offset; found blocks"),
        (counts_no_layers, "planner must count"),
        (looks_ahead, "depends on later ones"),
    ],
)
def test_the_check_finds_what_is_wrong(gated, break_it, words):
    register_head("broken", break_it(gated))
    with pytest.raises(TrainingError, match=words):
        check_head_kind("broken")


def test_abstract_methods_must_be_written():
    class Nothing(Heads):
        pass

    register_head("nothing", Nothing)
    with pytest.raises(TypeError, match="abstract"):
        build_model(Recipe.model_validate({"heads": {"kind": "nothing"}}))
