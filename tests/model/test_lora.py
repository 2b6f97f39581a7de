"""Low-rank updates: nothing at the start, merged = beside, and what is trained with them."""

import pytest
import torch
import torch.nn.functional as F

from mtp_lightning.errors import RecipeError
from mtp_lightning.model.freezing import freeze
from mtp_lightning.model.lora import LoraLinear, merged
from mtp_lightning.model.mtp_model import MtpModel, build_model
from mtp_lightning.model.roles import role_of
from mtp_lightning.recipe import load_recipe
from mtp_lightning.recipe.schema.model import LoraSection
from tests.support.tiny import HEAD_KINDS, NEOX, gradients_of, tiny_model, tiny_recipe, tiny_rows

ALL = ["q", "k", "v", "o", "gate", "up", "down"]


def adapted(lora=None, **sections):
    adapt = {"lora": {"rank": 3, **(lora or {})}} | sections.pop("adapt", {})
    return tiny_recipe(**({"model": {"num_hidden_layers": 9}} | sections), adapt=adapt)


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("kind", "in_heads"),
    [(kind, False) for kind in HEAD_KINDS] + [(k, True) for k in HEAD_KINDS if not k.startswith(("linear", "medusa"))],
)
def test_an_adapted_model_starts_bit_identical(kind, in_heads):
    recipe = adapted({"targets": ALL, "in_heads": in_heads}, heads=HEAD_KINDS[kind])
    plain = build_model(tiny_recipe(model={"num_hidden_layers": 9}, heads=HEAD_KINDS[kind]))
    model = build_model(recipe)
    tokens, documents, _ = tiny_rows(recipe, 2)
    expected = plain.hidden_states(tokens, documents)
    for offset, hidden in model.hidden_states(tokens, documents).items():
        assert torch.equal(hidden, expected[offset])
    names = dict(model.named_parameters())
    assert {name for name in names if role_of(name) != "lora"} == dict(plain.named_parameters()).keys()
    added = {name for name in names if role_of(name) == "lora"}
    num_layers = len([m for m in model.modules() if m._get_name() == "Layer"]) if in_heads else len(model.trunk.layers)
    assert len(added) == 2 * len(ALL) * num_layers > 0
    assert all(names[name].abs().max() > 0 for name in added if name.endswith("down"))


@pytest.mark.parametrize("model", [{}, NEOX], ids=["plain", "neox"])
def test_what_is_computed_is_the_merged_weight(model):
    section = LoraSection(rank=3, alpha=5.0)
    recipe = adapted({"targets": ["q", "v", "down"], "alpha": 5.0}, model={"num_hidden_layers": 9} | model)
    own = tiny_model(recipe)
    plain = build_model(recipe.model_copy(update={"adapt": type(recipe.adapt)()})).double()
    weights = dict(own.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            lora = [weights.get(f"{name.removesuffix('.weight')}.lora.{half}") for half in ("down", "up")]
            parameter.copy_(
                weights[name] if lora[0] is None else merged(weights[name], *lora, section.alpha / section.rank)
            )
    tokens, documents, _ = tiny_rows(recipe, 2)
    expected = plain.hidden_states(tokens, documents)
    for offset, hidden in own.hidden_states(tokens, documents).items():
        torch.testing.assert_close(hidden, expected[offset], rtol=1e-10, atol=1e-10)
    layer = own.trunk.layers[0].self_attn.q_proj
    update = 5 / 3 * layer.lora.up @ layer.lora.down
    scale = section.alpha / section.rank
    found = merged(layer.weight, layer.lora.down, layer.lora.up, scale)
    torch.testing.assert_close(found, layer.weight + update)


def test_gradients_are_those_of_the_product():
    linear = LoraLinear(torch.nn.Linear(6, 4), LoraSection(rank=2, alpha=3.0)).double()
    torch.nn.init.normal_(linear.lora.up)
    torch.nn.init.normal_(linear.lora.down)
    hidden = torch.randn(2, 5, 6, dtype=torch.float64)
    own = torch.autograd.grad(linear(hidden).square().sum(), [linear.lora.down, linear.lora.up])
    weight = linear.weight + 1.5 * linear.lora.up @ linear.lora.down
    expected = torch.autograd.grad(
        F.linear(hidden, weight, linear.bias).square().sum(), [linear.lora.down, linear.lora.up]
    )
    for found, wanted in zip(own, expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_dropout_falls_on_the_update_alone_and_not_in_evaluation():
    linear = LoraLinear(torch.nn.Linear(64, 8), LoraSection(rank=2, dropout=0.5))
    torch.nn.init.normal_(linear.lora.down)
    torch.nn.init.zeros_(linear.lora.up)
    hidden = torch.randn(2, 5, 64)
    assert torch.equal(linear(hidden), F.linear(hidden, linear.weight, linear.bias))
    torch.nn.init.normal_(linear.lora.up)
    assert not torch.equal(linear(hidden), linear(hidden))
    linear.eval()
    assert torch.equal(linear(hidden), linear(hidden))


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({}, {"lora", "heads", "unembedding"}),
        ({"freeze": ["unembedding"]}, {"lora", "heads"}),
        ({"freeze": ["unembedding", "heads"], "lora": {"in_heads": True}}, {"lora"}),
        ({"freeze": ["lora"]}, {"heads", "unembedding"}),
        ({"adapt": {"layer_mix": {}}, "freeze": ["heads"]}, {"lora", "layer_mix", "unembedding"}),
    ],
)
def test_what_is_trained(values, parts):
    recipe = adapted(values.get("lora"), adapt=values.get("adapt", {}), freeze=values.get("freeze", []))
    model = MtpModel(recipe)
    freeze(model, recipe)
    named = dict(model.named_parameters())
    assert trainable(model) == {name for name in named if role_of(name) in parts}
    assert {role_of(name) for name in trainable(model)} == parts


def test_with_trained_heads_from_2_on_updates_and_these_heads_are_trained():
    recipe = adapted(freeze=["offsets_below_2"])
    model = MtpModel(recipe)
    freeze(model, recipe)
    assert {".".join(name.split(".")[:3]) for name in trainable(model) if role_of(name) == "heads"} == {
        "heads.blocks.1", "heads.blocks.2", "heads.blocks.3",
    }  # fmt: skip
    assert {role_of(name) for name in trainable(model)} == {"lora", "heads"}


def test_the_frozen_trunk_keeps_nothing_for_a_backward_pass():
    """Heads alone against all: bytes that autograd keeps of the trunk, and of a whole step."""
    kept = {}
    sections = {"all": {}, "lora": {"adapt": {"lora": {}}}, "heads": {"freeze": ["trunk", "unembedding"]}}
    for name, changes in sections.items():
        recipe = tiny_recipe(model={"num_hidden_layers": 9}, **changes)
        model = tiny_model(recipe)
        freeze(model, recipe)
        tokens, documents, _ = tiny_rows(recipe, 2)
        embedded = model.embed(tokens)
        geometry = model.geometry(documents, like=embedded)
        sizes = {}

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            states = model.trunk_states(embedded[:, : recipe.data.seq_len], geometry)
        kept[name] = sum(sizes.values())
        assert states[0].requires_grad == (name != "heads")
    assert kept["heads"] == 0 < kept["lora"] < kept["all"]


@pytest.mark.parametrize("backward_order", ["joint", "sequential", "bridged"])
def test_frozen_parts_get_no_gradient(backward_order):
    recipe = adapted(freeze=["unembedding"], objective={"backward_order": backward_order})
    model = tiny_model(recipe)
    freeze(model, recipe)
    _, gradients = gradients_of(model, recipe, tiny_rows(recipe, 2))
    assert gradients.keys() == trainable(model)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapt.lora.targets=[q, gate]", "model.mlp=gelu"], "must name projections that the model has"),
        (["adapt.lora.targets=[qkv]"], "must be"),
        (["adapt.lora.targets=[]"], "must"),
        (["adapt.lora.targets=[q, q]"], "must name each projection once"),
        (["adapt.lora.rank=0"], ">= 1"),
        (["adapt.lora.dropout=1"], "< 1"),
        (["adapt.lora.in_heads=true", "heads.kind=medusa"], "must be false where heads hold no transformer layers"),
        (["freeze=[trunk, heads, unembedding]"], "must leave something that is trained"),
        (["freeze=[heads, offsets_below_2]"], "must leave something that is trained"),
    ],
)
def test_updates_that_cannot_be_are_refused(overrides, words, tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.yaml", overrides)
    (fault,) = caught.value.faults
    assert words in f"{fault.expected}", fault
    assert fault.found
    assert fault.hint
