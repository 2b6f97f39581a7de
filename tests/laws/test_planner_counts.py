"""Law 14: the planner counts the parameters of the meta-device model, for every head kind and every recipe."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mtp_lightning.losses.targets import shifted_targets
from mtp_lightning.model.freezing import freeze
from mtp_lightning.model.hidden_matrices import hidden_matrices
from mtp_lightning.model.mtp_model import MtpModel, build_model
from mtp_lightning.model.roles import ROLES, role_of
from mtp_lightning.planner.counts import kept_entries, parameter_counts, trainable_parameters
from mtp_lightning.planner.passes import backward_flow_of
from mtp_lightning.recipe.loading.load import load_recipe
from mtp_lightning.training.step.batch import MicroBatch
from mtp_lightning.training.step.optimizer import build_optimizer
from mtp_lightning.training.step.rollout import Rollout, RolloutDraw
from tests.support.covering import every_pair
from tests.support.tiny import HEAD_KINDS, NEOX, tiny_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml"))
MODELS = {
    "plain": {},
    "neox": NEOX,
    "biased": {"qkv_bias": True, "qk_norm": True},
    "tied": {"tie_word_embeddings": True},
    "wide_attention": {"head_dim": 10, "num_key_value_heads": 1, "intermediate_size": None},
}


def assert_counts_match(recipe):
    with torch.device("meta"):
        model = MtpModel(recipe)
    counted = dict.fromkeys(ROLES, 0)
    for name, parameter in model.named_parameters():
        counted[role_of(name)] += parameter.numel()
    counts = parameter_counts(recipe)
    assert counts.total == sum(counted.values()) > 0
    assert {role: getattr(counts, role) for role in counted} == counted


def test_there_are_recipes():
    assert len(RECIPES) > 5


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe(path):
    assert_counts_match(load_recipe(path).recipe)


def exists(*, kind, model="plain", **_):
    """A tied unembedding is one, not one for each offset."""
    return (model, kind[-10:]) != ("tied", "replicated")


@every_pair(exists, kind=HEAD_KINDS, model=MODELS, num_offsets=[1, 2, 4], full=True)
def test_every_kind(kind, model, num_offsets):
    heads = HEAD_KINDS[kind] | {"num_offsets": num_offsets}
    assert_counts_match(tiny_recipe(model=MODELS[model] | {"num_hidden_layers": 9}, heads=heads))


@pytest.mark.parametrize("kind", [kind for kind in HEAD_KINDS if kind != "anticausal"])
@pytest.mark.parametrize("first", [2, 4])
def test_trainable_parameters_are_those_left_by_freezing(kind, first):
    recipe = tiny_recipe(model={"num_hidden_layers": 9}, heads=HEAD_KINDS[kind], freeze=[f"offsets_below_{first}"])
    with torch.device("meta"):
        model = MtpModel(recipe)
    freeze(model, recipe)
    left = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable_parameters(recipe) == left
    assert (left > 0) or (kind == "recursive" and first > 2)


@pytest.mark.parametrize("kind", HEAD_KINDS)
@pytest.mark.parametrize("freeze_parts", [[], ["trunk"], ["offsets_below_3"]])
def test_muons_state_is_one_momentum_of_each_matrix_that_it_steps(kind, freeze_parts):
    if kind == "anticausal" and freeze_parts == ["offsets_below_3"]:
        pytest.skip("every head of it serves the first offset")
    sections = {"model": {"num_hidden_layers": 9}, "heads": HEAD_KINDS[kind], "freeze": freeze_parts}
    recipe = tiny_recipe(**sections, optimizer={"kind": "muon", "ema": {}})
    with torch.device("meta"):
        model = MtpModel(recipe)
    freeze(model, recipe)
    matrices = hidden_matrices(model)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    moments = sum(count * (1 if name in matrices else 2) for name, count in trained.items())
    assert kept_entries(recipe) == moments + sum(trained.values())
    assert kept_entries(tiny_recipe(**sections)) == 2 * sum(trained.values())


@pytest.mark.parametrize("kind", HEAD_KINDS)
@pytest.mark.parametrize(
    "sections",
    [
        {"model": NEOX, "freeze": ["offsets_below_2"]},
        {"adapt": {"lora": {"rank": 3}, "layer_mix": {}}, "freeze": ["unembedding"]},
        {"model": {"tie_word_embeddings": True, "qk_norm": True}, "objective": {"token_order": {"window_size": 4}}},
    ],
)
def test_adafactors_state_is_what_it_keeps_of_the_trained_parameters(kind, sections):
    if kind == "anticausal" and "offsets_below_2" in sections.get("freeze", []):
        pytest.skip("every head of it serves the first offset")
    if not exists(kind=kind, model="tied" if "tie_word_embeddings" in sections.get("model", {}) else "plain"):
        pytest.skip("a tied unembedding is one")
    model = {"num_hidden_layers": 9} | sections.get("model", {})
    recipe = tiny_recipe(**{**sections, "model": model, "heads": HEAD_KINDS[kind], "optimizer": {"kind": "adafactor"}})
    built = build_model(recipe)
    freeze(built, recipe)
    for parameter in built.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer = build_optimizer(built, recipe.optimizer)
    optimizer.step()
    kept = sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.dim())
    assert kept_entries(recipe) == kept > 0


ADAPTATIONS = {
    "updates": ({"lora": {"rank": 3}}, []),
    "updates_everywhere": (
        {"lora": {"targets": ["q", "k", "v", "o", "gate", "up", "down"], "in_heads": True}},
        ["heads"],
    ),
    "updates_beside_frozen_heads": ({"lora": {}}, ["offsets_below_2"]),
    "mixtures": ({"layer_mix": {}}, []),
    "mixtures_of_a_frozen_model": ({"layer_mix": {}}, ["trunk", "unembedding", "heads"]),
    "updates_as_they_are": ({"lora": {}}, ["lora"]),
}


def can_be_adapted(*, kind, model, adaptation):
    """Updates name projections that there are; the heads of an anticausal chain are trained together."""
    adapt, frozen = ADAPTATIONS[adaptation]
    gate = "gate" in adapt.get("lora", {}).get("targets", [])
    return (
        exists(kind=kind, model=model)
        and not (gate and model == "neox")
        and not (adapt.get("lora", {}).get("in_heads") and kind.startswith(("linear", "medusa")))
        and not ("offsets_below_2" in frozen and kind == "anticausal")
    )


@every_pair(can_be_adapted, kind=HEAD_KINDS, model=["neox", "tied"], adaptation=ADAPTATIONS, full=True)
def test_adapted_models(kind, model, adaptation):
    adapt, frozen = ADAPTATIONS[adaptation]
    recipe = tiny_recipe(
        model=MODELS[model] | {"num_hidden_layers": 9}, heads=HEAD_KINDS[kind], adapt=adapt, freeze=frozen
    )
    assert_counts_match(recipe)
    with torch.device("meta"):
        built = MtpModel(recipe)
    freeze(built, recipe)
    left = sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)
    assert trainable_parameters(recipe) == left > 0


def test_token_order_matrix():
    assert_counts_match(tiny_recipe(objective={"token_order": {"window_size": 4}}))


@every_pair(model=["plain", "neox"], kind=HEAD_KINDS, is_adapted=[False, True])
def test_products_forward_are_those_of_the_model(model, kind, is_adapted):
    """Compare with the matrix products that the model really computes."""
    adapt = {"lora": {"rank": 3, "targets": ["q", "v", "o", "up", "down"]}} if is_adapted else {}
    recipe = tiny_recipe(model=MODELS[model] | {"num_hidden_layers": 9}, heads=HEAD_KINDS[kind], adapt=adapt)
    model = build_model(recipe)
    length = recipe.data.seq_len + recipe.heads.num_offsets
    tokens = torch.zeros(2, length, dtype=torch.long)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for offset, hidden in model.hidden_states(tokens, tokens).items():
            model.unembedding.logits(offset, hidden)
    by_kind = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for op, flops in by_kind.items() if "mm" in op)
    assert products == 2 * backward_flow_of(recipe).all.forward * 2 * recipe.data.seq_len


@pytest.mark.parametrize("kind", ["sequential", "recursive"])
@pytest.mark.parametrize("where", ["all", "reached"])
def test_products_of_a_rollout_are_those_of_a_step(kind, where):
    """Far offsets run twice, and what offsets 2 and 3 draft is scored once more."""
    recipe = tiny_recipe(heads=HEAD_KINDS[kind], objective={"rollout": {"where": where}})
    model, num_positions = build_model(recipe), recipe.data.seq_len
    tokens = torch.zeros(2, num_positions + 4, dtype=torch.long)
    batch = MicroBatch(tokens, tokens, shifted_targets(tokens, tokens, 4))
    rollout = Rollout(model, batch, RolloutDraw.at(recipe, 0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for offset, hidden in model.hidden_states(tokens, tokens, run=rollout.run_and_draft).items():
            model.unembedding.logits(offset, rollout.scored(hidden))
    flow = backward_flow_of(recipe)
    products = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "mm" in str(op))
    assert products == 2 * (flow.all.forward + flow.drafts.forward) * 2 * num_positions
    given = backward_flow_of(tiny_recipe(heads=HEAD_KINDS[kind])).heads.work
    far = 2 / 3 if where == "all" else 0  # of the three modules
    assert flow.heads.work.entries == pytest.approx((1 + far) * given.entries)
