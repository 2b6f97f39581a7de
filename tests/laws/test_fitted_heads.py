"""Heads that start fitted: the closed form is the least-squares solution, and exact where an exact map exists."""

import pytest
import torch

from mtp_lightning.model import fit_heads as fitting
from mtp_lightning.model.fit_heads import fit_heads
from tests.support.tiny import HEAD_KINDS, NEOX, tiny_model, tiny_recipe, tiny_rows

KINDS = {
    **{name: HEAD_KINDS[name] for name in ("linear", "sequential", "sequential_pre_norm", "recursive")},
    "sequential_hidden_first": {"kind": "sequential", "concatenation": "hidden_first"},
    "recursive_pre_norm": {"kind": "recursive", "hidden": "pre_norm"},
    "two_layers": {"kind": "sequential", "layers_per_head": 2},
}
NORMS = {"rms": {}, "layer": NEOX}


def tiny(kind, norm="rms", **heads):
    section = {"num_offsets": 3, "layers_from_trunk": False, **KINDS[kind], **heads}
    recipe = tiny_recipe(model=NORMS[norm], heads=section)
    return recipe, tiny_model(recipe)


def maps_of(recipe, model):
    """Every map with the first offset that it computes, and what each extra head is to give: its depth."""
    if recipe.heads.kind == "recursive":
        return {2: model.heads.block.eh_proj}, recipe.heads.layers_per_head
    if recipe.heads.kind == "linear":
        return dict(enumerate(model.heads.blocks, start=2)), 0
    return {offset: block.eh_proj for offset, block in enumerate(model.heads.blocks, start=2)}, (
        recipe.heads.layers_per_head
    )


def inputs_of(recipe, model, offset, state, tokens):
    """What the map of an offset reads, written out."""
    if recipe.heads.kind == "linear":
        return state
    block = model.heads.block if recipe.heads.kind == "recursive" else model.heads.blocks[offset - 2]
    if recipe.heads.hidden == "post_norm":
        state = model.unembedding.norms[0 if offset == 2 else model.heads.norm_index(offset - 1)](state)
    token = model.trunk.embed_tokens(tokens[:, offset - 1 : offset - 1 + state.shape[1]])
    parts = [block.enorm(token), block.hnorm(state)]
    return torch.cat(parts if recipe.heads.concatenation == "embedding_first" else parts[::-1], dim=-1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_map_is_the_least_squares_solution(kind, norm):
    """By QR of all positions at once, with the ridge as rows of its own."""
    recipe, model = tiny(kind, norm)
    tokens, documents, _ = tiny_rows(recipe, 30)
    names = set(fit_heads(model, tokens, documents, rows_at_once=7))
    maps, depth = maps_of(recipe, model)
    assert names == {name for name, p in model.named_parameters() if any(p is m.weight for m in maps.values())}
    states = model.hidden_states(tokens, documents)
    num_positions = recipe.data.seq_len
    geometry = model.geometry(documents, like=states[1])
    layers = [model.trunk.embed_tokens(tokens[:, :num_positions])]
    layers += model.trunk.layers.walk(layers[0], geometry)
    for offset, linear in maps.items():
        read = states[1] if recipe.heads.kind == "linear" else states[offset - 1]
        inputs, aims = inputs_of(recipe, model, offset, read, tokens), layers[len(layers) - 1 - depth]
        pairs = [
            (inputs[row, t], aims[row, t + offset - 1])
            for row in range(len(tokens))
            for t in range(num_positions - offset + 1)
            if documents[row, t] == documents[row, t + offset - 1]
        ]
        x, y = (torch.stack(part) for part in zip(*pairs, strict=True))
        weight = y.square().mean(-1, keepdim=True).rsqrt()
        x, y = weight * x, weight * y
        ridge = (fitting.RIDGE * x.square().sum(0).mean()).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
        zeros = torch.zeros(len(ridge), y.shape[1], dtype=y.dtype)
        wanted = torch.linalg.lstsq(torch.cat([x, ridge]), torch.cat([y, zeros])).solution.T
        torch.testing.assert_close(linear.weight, wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "linear"])
@torch.no_grad()
def test_a_module_is_the_copied_layers_on_the_next_state_where_that_can_be(kind, norm, monkeypatch):
    """The layers below the copied ones do nothing and embeddings are of one size: the token says all."""
    monkeypatch.setattr(fitting, "RIDGE", 1e-14)
    recipe, model = tiny(kind, norm)
    depth = recipe.heads.layers_per_head
    trunk = [*model.trunk.layers]
    for layer in trunk[:-depth]:
        for name, parameter in layer.named_parameters():
            if name.startswith(("self_attn.o_proj", "mlp.down_proj")):
                parameter.zero_()
    table = model.trunk.embed_tokens.weight
    table -= table.mean(-1, keepdim=True)
    table *= table.square().mean(-1, keepdim=True).rsqrt()
    block = model.heads.block if recipe.heads.kind == "recursive" else model.heads.blocks[0]
    block.enorm.reset_parameters()
    for copied, own in zip(block.layers, trunk[-depth:], strict=True):
        copied.load_state_dict(own.state_dict())
    tokens, _, _ = tiny_rows(recipe, 40)
    documents = torch.zeros_like(tokens)
    fit_heads(model, tokens, documents)
    found = model.hidden_states(tokens, documents)[2]
    embedded = model.trunk.embed_tokens(tokens[:, 1 : 1 + recipe.data.seq_len])
    wanted = block.layers(embedded, model.geometry(documents, like=embedded))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_linear_map_finds_a_text_that_always_goes_on_alike(monkeypatch):
    """Token v + 1 follows v; without layers the state k - 1 tokens on is a linear map of the state."""
    monkeypatch.setattr(fitting, "RIDGE", 1e-14)
    _, model = tiny("linear")
    for name, parameter in model.trunk.layers.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
    tokens = (torch.arange(12) + torch.arange(13)[:, None]) % 13
    fit_heads(model, tokens, torch.zeros_like(tokens))
    states = model.hidden_states(tokens, torch.zeros_like(tokens))
    for offset in (2, 3):
        torch.testing.assert_close(states[offset][:, : 1 - offset], states[1][:, offset - 1 :], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["parallel", "causal", "medusa"])
def test_kinds_without_such_a_map_stay_as_they_are(kind):
    recipe = tiny_recipe(heads=HEAD_KINDS[kind])
    model = tiny_model(recipe)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    tokens, documents, _ = tiny_rows(recipe, 2)
    assert fit_heads(model, tokens, documents) == {}
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
