"""Law 2: n = 1 is exactly a next-token model; heads without weight, or cut off, change no trunk gradient."""

import torch
import torch.nn.functional as F

from mtp_lightning.losses.targets import IGNORE, shifted_targets
from mtp_lightning.model.layers import Layer
from tests.support.covering import every_pair
from tests.support.tiny import HEAD_KINDS, gradients_of, relative_error, tiny_model, tiny_recipe, tiny_rows


def plain_next_token_loss(model, tokens, documents, targets):
    """A next-token transformer written out: embed, every layer, final norm, matrix, cross-entropy."""
    hidden = model.trunk.embed_tokens(tokens[:, :-1])
    geometry = model.geometry(documents, like=hidden)
    for layer in [module for module in model.modules() if isinstance(module, Layer)]:
        hidden = layer(hidden, geometry)
    logits = F.linear(model.unembedding.norms[0](hidden), model.unembedding.lm_heads[0].weight)
    return F.cross_entropy(logits.flatten(0, 1), targets[0].flatten(), ignore_index=IGNORE)


@every_pair(kind=HEAD_KINDS, backward_order=["sequential", "bridged", "joint"])
def test_one_offset_is_a_next_token_model(kind, backward_order):
    recipe = tiny_recipe(heads=HEAD_KINDS[kind] | {"num_offsets": 1}, objective={"backward_order": backward_order})
    model = tiny_model(recipe)
    tokens, documents, mask = tiny_rows(recipe, 2)
    losses, gradients = gradients_of(model, recipe, (tokens, documents, mask))
    targets = shifted_targets(tokens, documents, 1, mask)
    model.zero_grad()
    expected = plain_next_token_loss(model, tokens, documents, targets)
    expected.backward()
    assert sum(isinstance(module, Layer) for module in model.modules()) == recipe.model.num_hidden_layers
    assert relative_error(losses[0].nll_sums[0] / (targets != IGNORE).sum(), expected) < 1e-12
    for name, parameter in model.named_parameters():
        assert relative_error(gradients[name], parameter.grad) < 1e-10, name


@every_pair(
    kind=[kind for kind in HEAD_KINDS if kind != "anticausal"],
    backward_order=["sequential", "bridged", "joint"],
    removed_by=["weight", "isolation"],
    full=True,
)
def test_heads_without_say_change_no_trunk_gradient(kind, backward_order, removed_by):
    def trunk_gradients(weights, *, isolated):
        heads = HEAD_KINDS[kind] | {"detach_trunk": isolated}
        recipe = tiny_recipe(heads=heads, objective={"backward_order": backward_order})
        _, gradients = gradients_of(tiny_model(recipe), recipe, tiny_rows(recipe, 2), weights)
        return {name: gradient for name, gradient in gradients.items() if name.startswith("trunk.")}

    alone = trunk_gradients([1.0, 0.0, 0.0, 0.0], isolated=False)
    with_heads = trunk_gradients([1.0, 1.0, 1.0, 1.0], isolated=False)
    if removed_by == "weight":
        silenced = trunk_gradients([1.0, 0.0, 0.0, 1e-300], isolated=False)
    else:
        silenced = trunk_gradients([1.0, 1.0, 1.0, 1.0], isolated=True)
    assert alone.keys() == silenced.keys() == with_heads.keys()
    for name, gradient in alone.items():
        assert relative_error(silenced[name], gradient) < 1e-12, name
        assert relative_error(with_heads[name], gradient) > 1e-3, name


def test_initial_weights_do_not_depend_on_the_number_of_offsets():
    models = [tiny_recipe(heads={"num_offsets": n, "kind": "sequential"}) for n in (1, 4)]
    one, four = (tiny_model_without_noise(recipe) for recipe in models)
    shared = one.state_dict().keys() & four.state_dict().keys()
    assert any(name.startswith("trunk.layers.2.") for name in shared)
    for name in shared:
        assert torch.equal(one.state_dict()[name], four.state_dict()[name]), name


def tiny_model_without_noise(recipe):
    from mtp_lightning.model.mtp_model import build_model

    return build_model(recipe)
