"""Laws over tiny decoders of transformers: every architecture with a head kind and an objective of its own."""

import pytest
import torch

from mtp_lightning.errors import CheckpointError
from mtp_lightning.model.mtp_model import MtpModel, build_model
from mtp_lightning.model.transformers_architecture import architecture_of
from mtp_lightning.recipe.draft_vocabulary import with_draft_ids
from mtp_lightning.recipe.schema.root import Recipe
from tests.laws.test_draft_vocabulary import IDS, plain_step
from tests.support.architectures import SETTINGS, architecture_recipe, judge_of
from tests.support.covering import some_of
from tests.support.tiny import HEAD_KINDS, gradients_of, relative_error, tiny_rows

pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[transformers]'"
)
TOLERANCE = 2e-6
"""Norms and routers of transformers compute in float32 whatever they are given."""
OBJECTIVES = (
    {"objective": {"label_smoothing": 0.1, "z_loss": 0.01}},
    {"objective": {"balance": "rms"}},
    {"objective": {"distill": {"divergence": "forward_kl", "top_k": 20}}},
    {"objective": {"token_order": {"weight": 0.7, "window_size": 6}}},
    {"memory": {"recompute_trunk": True, "recompute_heads": True}},
)
ORDERS = ("joint", "sequential", "bridged")
NAMES = list(SETTINGS)
KINDS = [kind for kind in HEAD_KINDS if not kind.endswith("replicated")]


def exact_model(recipe: Recipe) -> MtpModel:
    """The recipe's model in float64 with noise on every parameter, so that nothing is zero or one by construction."""
    architecture_of(recipe.model).config._experts_implementation = "eager"  # the others know no float64
    model = build_model(recipe).to(torch.float64)
    model.tie_word_embeddings()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def assert_orders_agree(name: str, kind: str, options: dict[str, object], *, documents: bool, masked: bool) -> None:
    results = {}
    for order in ORDERS:
        sections = {key: dict(value) for key, value in options.items()}
        sections["objective"] = {"backward_order": order, "chunk_mib": 0.002, **sections.get("objective", {})}
        heads = HEAD_KINDS[kind] | {"layers_from_trunk": False}
        recipe = architecture_recipe(name, heads=heads, data={"document_mask": documents}, **sections)
        tokens, numbers, mask = tiny_rows(recipe, 2)
        model = exact_model(recipe)
        torch.manual_seed(0)  # routers of PhiMoE draw in training, in the order of the forward passes
        results[order] = gradients_of(model, recipe, (tokens, numbers, mask if masked else None))
    wanted_losses, wanted = results.pop("joint")
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert wanted.keys() == trained
    for order, (losses, gradients) in results.items():
        for found, expected in zip(losses, wanted_losses, strict=True):
            torch.testing.assert_close(found.nll_sums, expected.nll_sums, rtol=TOLERANCE, atol=0)
        assert gradients.keys() == wanted.keys()
        least = 1e-9 * max(float(gradient.norm()) for gradient in wanted.values())  # zero but for rounding: key biases
        errors = {
            key: float((gradients[key] - wanted[key]).norm() / wanted[key].norm().clamp(min=least)) for key in wanted
        }
        assert max(errors.values()) <= TOLERANCE, (order, max(errors, key=errors.__getitem__), max(errors.values()))


@pytest.mark.parametrize("name", some_of(NAMES, one_in=4))
def test_backward_orders_agree(name: str) -> None:
    """Law 1."""
    place = NAMES.index(name)
    documents = name != "qwen3_next"
    kind, options = KINDS[place % len(KINDS)], OBJECTIVES[place % len(OBJECTIVES)]
    assert_orders_agree(name, kind, options, documents=documents, masked=place % 2 == 0)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_the_loss_of_routers_is_that_of_transformers(name: str) -> None:
    """Gradients of cross-entropy and router loss together are those of transformers' own loss."""
    heads = {"num_offsets": 1, "kind": "sequential"}
    recipe = architecture_recipe(name, heads=heads, data={"document_mask": False}, memory={"recompute_trunk": True})
    model = build_model(recipe)
    judge = judge_of(model)
    tokens, documents, _ = tiny_rows(recipe, 2)
    losses, gradients = gradients_of(model, recipe, (tokens, torch.zeros_like(documents), None))
    output = judge(input_ids=tokens[:, :-1])
    cross_entropy = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), tokens[:, 1:].flatten())
    (cross_entropy + judge.router_aux_loss_coef * output.aux_loss).backward()
    torch.testing.assert_close(losses[0].router_loss, output.aux_loss.detach())
    theirs = {key: parameter.grad for key, parameter in judge.named_parameters()}
    names = model.trunk.architecture.names
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[names.theirs(key)], rtol=1e-4, atol=1e-6)


def test_a_trunk_that_kept_dense_layers_only_has_no_loss_of_routers() -> None:
    """Qwen2-MoE routes in every other layer, and the last layers of a trunk can become heads."""
    recipe = architecture_recipe("qwen2_moe", heads=HEAD_KINDS["parallel_two_layers"])
    model = build_model(recipe)
    assert len(model.trunk.layers) == 1
    tokens, documents, _ = tiny_rows(recipe, 2)
    losses, _ = gradients_of(model, recipe, (tokens, documents, None))
    assert losses[0].router_loss is None


@pytest.mark.parametrize("name", some_of(["gemma2", "phi3", "falcon", "deepseek_v3", "bloom"], one_in=2))
def test_backward_orders_agree_with_low_rank_updates(name: str) -> None:
    lora = {"lora": {"rank": 2, "targets": ["q", "v", "o"], "in_heads": True}}
    assert_orders_agree(name, "sequential", {"adapt": lora}, documents=True, masked=True)


WHAT_SCORES_BECOME = {
    "phi": lambda scores: scores,  # its unembedding has a bias
    "gemma2": lambda scores: 3.0 * torch.tanh(scores / 3.0),
    "granite": lambda scores: scores / 3.0,
}
"""By the settings of `SETTINGS`."""


@pytest.mark.parametrize("divergence", [None, "lk_lambda"])
@pytest.mark.parametrize("name", WHAT_SCORES_BECOME)
def test_a_draft_vocabulary_restricts_scores_with_a_bias_a_cap_or_a_scale(name: str, divergence: str | None) -> None:
    """Gradients in the three orders are those of full scores that are then restricted."""
    for order in ORDERS:
        distill = {"divergence": divergence, "detach_teacher": False} if divergence else None
        recipe = architecture_recipe(
            name,
            heads={"num_offsets": 3, "kind": "sequential", "draft_vocabulary": len(IDS)},
            data={"document_mask": False},
            objective={"backward_order": order, "chunk_mib": 0.002, "distill": distill},
        )
        recipe = with_draft_ids(recipe, IDS)
        tokens, documents, mask = tiny_rows(recipe, 2)
        model = exact_model(recipe)
        rows = (tokens % 13, documents, mask)  # so that about half of them can be drafted
        sums, expected = plain_step(model, recipe, rows, WHAT_SCORES_BECOME[name])
        losses, gradients = gradients_of(model, recipe, rows)
        torch.testing.assert_close(losses[0].nll_sums, torch.stack(sums), rtol=TOLERANCE, atol=0)
        assert gradients.keys() == expected.keys()
        assert gradients["unembedding.lm_heads.0.bias"].any() if name == "phi" else True
        errors = {key: relative_error(gradients[key], expected[key]) for key in expected if expected[key].norm() > 1e-9}
        assert max(errors.values()) <= TOLERANCE, (order, max(errors, key=errors.__getitem__), max(errors.values()))


def test_a_target_without_a_linear_map_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"gate; linear are .*mlp\.c_fc"):
        build_model(architecture_recipe("starcoder2", adapt={"lora": {"targets": ["q", "gate"]}}))


def test_the_main_head_learns_as_if_it_were_alone() -> None:
    """Law 2: a head with weight 0 changes no gradient of the trunk, and one offset is a next-token model."""
    results = []
    for num_offsets in (1, 3):
        heads = {"num_offsets": num_offsets, "kind": "sequential"}
        recipe = architecture_recipe("gemma2", heads=heads, data={"document_mask": False})
        rows = torch.arange(2 * 12).view(2, 12) * 7 % 61
        tokens = torch.cat([rows, rows[:, : num_offsets - 1]], 1)
        model = build_model(recipe)
        documents = torch.zeros_like(tokens)
        weights = [1.0, 0.0, 0.0][:num_offsets]
        results.append(gradients_of(model, recipe, (tokens, documents, None), weights)[1])
    assert results[0].keys() == {name for name in results[1] if not name.startswith("heads.")}
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name])


def test_initial_weights_are_those_of_transformers_rules_and_depend_on_seed_and_name_alone() -> None:
    model, again, other = (
        dict(build_model(architecture_recipe("gemma2", run={"seed": seed})).named_parameters()) for seed in (0, 0, 1)
    )
    layer = "trunk.decoder.layers.0"
    assert all(torch.equal(model[name], again[name]) for name in model)
    assert not model[f"{layer}.input_layernorm.weight"].any()  # what Gemma adds to one
    assert not model["unembedding.norms.1.weight"].any()
    assert not model["heads.blocks.0.hnorm.weight"].any()
    drawn = [model[f"{place}.self_attn.q_proj.weight"] for place in (layer, "heads.blocks.0.layers.0")]
    for weight in drawn:
        assert weight.std().item() == pytest.approx(0.2, rel=0.1)
    assert not torch.equal(*drawn)
    assert not torch.equal(drawn[0], other[f"{layer}.self_attn.q_proj.weight"])
