"""Laws 5 and 6 of weighted hidden states: what heads read is the mixture that it is said to be, also in decoding."""

import pytest
import torch

from mtp_lightning.model.mtp_model import build_model
from mtp_lightning.recipe import Recipe, check_rules
from tests.support.tiny import HEAD_KINDS, gradients_of, tiny_model, tiny_recipe, tiny_rows

MIXED = {"layer_mix": {}}


def layer_outputs(model, tokens, documents):
    """Outputs of all layers of the trunk, by hooks of torch: (L, B, T, D)."""
    seen = []
    hooks = [layer.register_forward_hook(lambda _, __, output: seen.append(output)) for layer in model.trunk.layers]
    embedded = model.embed(tokens)
    num_positions = tokens.shape[1] - model.num_offsets
    states = model.trunk_states(embedded[:, :num_positions], model.geometry(documents, like=embedded))
    for hook in hooks:
        hook.remove()
    return torch.stack(seen), states


@pytest.fixture
def mixed():
    recipe = tiny_recipe(model={"num_hidden_layers": 9}, adapt=MIXED)
    tokens, documents, _ = tiny_rows(recipe, 2)
    return tiny_model(recipe), tokens, documents


def test_mixtures_start_as_the_mean_of_the_layers():
    recipe = tiny_recipe(model={"num_hidden_layers": 9}, adapt=MIXED)
    model = build_model(recipe).double()
    tokens, documents, _ = tiny_rows(recipe, 2)
    outputs, states = layer_outputs(model, tokens, documents)
    assert {*states} == {0, -1, -2, -3, -4}
    assert torch.equal(model.layer_mix["1"].weight.float(), torch.full((5,), 0.1))
    for offset in range(1, 5):
        torch.testing.assert_close(states[-offset], outputs.mean(0), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("layer", [0, 3, 4])
def test_a_one_hot_mixture_is_that_layer(mixed, layer):
    model, tokens, documents = mixed
    with torch.no_grad():
        model.layer_mix["2"].weight.zero_()[layer] = 100.0
    outputs, states = layer_outputs(model, tokens, documents)
    assert torch.equal(states[-2], outputs[layer])
    assert torch.equal(states[0], outputs[-1])


def test_any_mixture_is_the_softmax_of_its_weights(mixed):
    model, tokens, documents = mixed
    outputs, states = layer_outputs(model, tokens, documents)
    for offset in range(1, 5):
        shares = torch.softmax(model.layer_mix[str(offset)].weight / 0.1, 0)
        assert shares.std() > 0.01
        torch.testing.assert_close(states[-offset], torch.einsum("l,lbtd->btd", shares, outputs))


def test_each_head_reads_its_own_mixture(mixed):
    model, tokens, documents = mixed
    _, states = layer_outputs(model, tokens, documents)
    geometry = model.geometry(documents, like=states[0])
    hiddens = model.hidden_states(tokens, documents)
    for offset in range(1, 5):
        expected = model.heads.blocks[offset - 1](states[-offset], geometry)
        torch.testing.assert_close(hiddens[offset], expected, rtol=1e-12, atol=1e-12)


def test_the_main_head_may_keep_the_last_layer():
    recipe = tiny_recipe(model={"num_hidden_layers": 9}, adapt={"layer_mix": {"main_head": False}})
    plain = tiny_recipe(model={"num_hidden_layers": 9})
    tokens, documents, _ = tiny_rows(recipe, 2)
    own, other = (build_model(r).hidden_states(tokens, documents) for r in (recipe, plain))
    assert torch.equal(own[1], other[1])
    assert not torch.equal(own[2], other[2])


def test_gradients_are_those_of_a_stack_of_layers(mixed):
    """The whole stack, mixed by one product, is the definition."""
    model, tokens, documents = mixed
    weights = [mixture.weight for mixture in model.layer_mix.values()]
    outputs, states = layer_outputs(model, tokens, documents)
    mixed_states = torch.stack([states[-offset] for offset in range(1, 5)])
    upstream = torch.randn_like(mixed_states)
    lean = torch.autograd.grad(mixed_states, weights, upstream, retain_graph=True)
    shares = torch.softmax(torch.stack(weights) / 0.1, 1)
    plain = torch.autograd.grad(torch.einsum("nl,lbtd->nbtd", shares, outputs), weights, upstream)
    for found, expected in zip(lean, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_frozen_trunk_keeps_its_layers_outputs_and_nothing_else(mixed):
    model, tokens, documents = mixed
    model.trunk.requires_grad_(requires_grad=False)
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, states = layer_outputs(model, tokens, documents)
    assert all(states[-offset].requires_grad for offset in range(1, 5))
    large = [size for size in kept.values() if size >= states[0].nbytes]
    assert large == [states[0].nbytes] * 5


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_every_kind_trains_its_mixtures(kind):
    recipe = tiny_recipe(model={"num_hidden_layers": 9}, heads=HEAD_KINDS[kind], adapt=MIXED)
    model = tiny_model(recipe)
    readers = {offset for offset in range(1, 5) if model.heads.parent_of(offset) == 0}
    assert {int(offset) for offset in model.layer_mix} == readers
    _, gradients = gradients_of(model, recipe, tiny_rows(recipe, 2))
    assert all(gradients[f"layer_mix.{offset}.weight"].abs().max() > 0 for offset in readers)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": {"num_hidden_layers": 5}}, "layers to choose from"),
        ({"heads": {"detach_trunk": True}}, "heads.detach_trunk"),
        ({"freeze": ["offsets_below_2"]}, "a frozen head would read the mean"),
    ],
)
def test_mixtures_that_cannot_be_learnt_are_refused(values, words):
    recipe = Recipe.model_validate({"adapt": MIXED, **values})
    found = [fault.expected for fault in check_rules(recipe)]
    assert any(words in line for line in found), found
