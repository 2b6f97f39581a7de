"""What heads on an imported model start as, and that the model itself stays what it was."""

import json

import pytest
import safetensors.torch
import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.errors import CheckpointError
from mtp_lightning.model.mtp_model import build_model
from mtp_lightning.recipe import load_recipe
from tests.checkpoint.foreign import LAYERS, MODULE_PREFIXES, WIDTH, llama_tensors, module_tensors, write_folder
from tests.checkpoint.meta_model import meta_logits, write_meta
from tests.checkpoint.runs import model_of_step, save_run
from tests.support.covering import some_of
from tests.support.tiny import tiny_recipe

KINDS = ("parallel", "linear", "chained", "sequential", "recursive", "medusa")
COPYING = ("parallel", "chained", "sequential", "recursive")
TOKENS = torch.randint(13, (2, 24), generator=torch.Generator().manual_seed(1))


def imported(tmp_path, tensors=None, name="ours", settings=None, **wanted):
    folder = write_folder(tmp_path / "hf", tensors, **(settings or {}))
    import_folder(folder, tmp_path / name, Wanted(**wanted))
    return load_model(tmp_path / name)


def scores(model, tokens=TOKENS, num_positions=16):
    """Logits of every offset over the same positions, whatever the number of offsets."""
    rows = tokens[:, : num_positions + model.num_offsets]
    states = model.hidden_states(rows, torch.zeros_like(rows))
    return {offset: model.unembedding.logits(offset, state) for offset, state in states.items()}


@pytest.mark.parametrize(
    ("kind", "init"),
    some_of([*((kind, "random") for kind in KINDS), *((kind, "copy") for kind in COPYING)], one_in=2),
)
def test_the_main_head_is_the_base_model_bit_for_bit(kind, init, tmp_path):
    _, base = imported(tmp_path, name="base", num_offsets=1)
    recipe, model = imported(tmp_path, num_offsets=4, kind=kind, init=init)
    assert (recipe.heads.kind, recipe.heads.num_offsets) == (kind, 4)
    found = scores(model)
    assert torch.equal(found[1], scores(base)[1])
    assert len(found) == 4


@pytest.mark.parametrize("kind", ["sequential", "recursive"])
def test_modules_before_the_norm_are_fitted_to_it_and_served_as_mimo(kind, tmp_path):
    losses = {}
    for hidden in ("pre_norm", "post_norm"):
        recipe, model = imported(tmp_path, name=hidden, num_offsets=2, kind=kind, hidden=hidden, init="copy")
        assert recipe.heads.hidden == hidden
        losses[hidden] = scores(model)[2]
    assert not torch.equal(*losses.values())
    export_model(tmp_path / "pre_norm", tmp_path / "mimo", "mimo")
    with pytest.raises(CheckpointError, match="heads.hidden: post_norm"):
        export_model(tmp_path / "post_norm", tmp_path / "no", "mimo")


@pytest.mark.parametrize("wanted", [{"kind": "medusa"}, {}, {"kind": "sequential", "init": "native"}])
def test_a_state_for_modules_that_are_not_made_is_refused(wanted, tmp_path):
    modules = llama_tensors() | module_tensors("deepseek") if wanted.get("init") else None
    with pytest.raises(CheckpointError, match="--hidden needs new modules"):
        imported(tmp_path, modules, num_offsets=2, hidden="pre_norm", **wanted)


@pytest.mark.parametrize("kind", COPYING)
def test_copied_heads_hold_the_last_layer_and_norm(kind, tmp_path):
    _, model = imported(tmp_path, num_offsets=3, kind=kind, init="copy")
    stored = llama_tensors()
    last = {n.removeprefix("model.layers.2."): v for n, v in stored.items() if n.startswith("model.layers.2.")}
    layers = [layer for offset in (2, 3) for module in model.heads.modules_of(offset) for layer in layers_in(module)]
    assert len(layers) == 2
    for layer in layers:
        assert {name: value.tolist() for name, value in layer.named_parameters()} == {
            name: value.tolist() for name, value in last.items()
        }
    for norm in model.unembedding.norms:
        assert torch.equal(norm.weight, stored["model.norm.weight"])


def layers_in(module):
    return [part for name, part in module.named_modules() if hasattr(part, "self_attn")]


def test_a_parallel_copy_predicts_the_next_token_at_first(tmp_path):
    """Every head reads what the last layer reads, and is the last layer."""
    found = scores(imported(tmp_path, num_offsets=3, init="copy")[1])
    assert torch.equal(found[2], found[1])
    assert torch.equal(found[3], found[1])


def test_random_heads_are_those_of_a_new_model_of_the_recipe(tmp_path):
    recipe, model = imported(tmp_path, num_offsets=3, init="random")
    fresh = dict(build_model(recipe).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, fresh[name]) == name.startswith(("heads.blocks.1.", "heads.blocks.2.")), name


@pytest.mark.parametrize("kind", ["linear", "medusa"])
def test_heads_without_layers_start_as_the_main_head(kind, tmp_path):
    found = scores(imported(tmp_path, num_offsets=2, kind=kind)[1])
    torch.testing.assert_close(found[2], found[1])


@pytest.mark.parametrize("layout", MODULE_PREFIXES)
def test_modules_in_the_folder_are_imported(layout, tmp_path):
    torch.manual_seed(2)
    modules = module_tensors(layout)
    recipe, model = imported(tmp_path, llama_tensors() | modules)
    heads = recipe.heads
    assert (heads.kind, heads.num_offsets, heads.layers_from_trunk) == ("sequential", 2, False)
    assert (heads.hidden, heads.concatenation) == {
        "mimo": ("pre_norm", "hidden_first"),
    }.get(layout, ("post_norm", "embedding_first"))
    assert len(model.trunk.layers) == LAYERS
    ours = dict(model.heads.blocks[0].named_parameters())
    ours["norm"] = model.unembedding.norms[1].weight
    found = sorted((value.tolist() for value in ours.values()), key=str)
    assert found == sorted((value.tolist() for value in modules.values()), key=str)
    block = model.heads.blocks[0]
    assert torch.equal(block.eh_proj.weight, next(value for value in modules.values() if value.shape[-1] == 2 * WIDTH))
    names = {"deepseek": "enorm", "mimo": "token_layernorm", "qwen": "pre_fc_norm_embedding"}
    assert torch.equal(block.enorm.weight, modules[f"{MODULE_PREFIXES[layout]}{names[layout]}.weight"])


def test_several_modules_count_extra_tokens_only(tmp_path):
    torch.manual_seed(2)
    modules = module_tensors("deepseek") | module_tensors("deepseek", 1)
    copies = {
        f"model.layers.{LAYERS + number}.{name}": llama_tensors()[original]
        for number in range(2)
        for name, original in {
            "embed_tokens.weight": "model.embed_tokens.weight",
            "shared_head.head.weight": "lm_head.weight",
        }.items()
    }
    recipe, model = imported(tmp_path, llama_tensors() | modules | copies, settings={"num_nextn_predict_layers": 2})
    assert recipe.heads.num_offsets == 3
    assert torch.equal(model.heads.blocks[1].eh_proj.weight, modules[f"model.layers.{LAYERS + 1}.eh_proj.weight"])


def test_one_module_can_be_unrolled(tmp_path):
    torch.manual_seed(2)
    modules = module_tensors("mimo")
    recipe, model = imported(tmp_path, llama_tensors() | modules, num_offsets=4, kind="recursive", init="native")
    assert (recipe.heads.kind, recipe.heads.num_offsets, recipe.heads.hidden) == ("recursive", 4, "pre_norm")
    assert torch.equal(model.heads.block.eh_proj.weight, modules["model.mtp_layers.0.input_proj.weight"])


@pytest.mark.parametrize("layout", ["deepseek", "mimo"])
def test_modules_are_exported_as_they_came(layout, tmp_path):
    torch.manual_seed(2)
    tensors = llama_tensors() | module_tensors(layout)
    settings = {"model_type": "mimo"} if layout == "mimo" else {}
    if layout == "mimo":
        shapes = {"q": 16, "k": 8, "v": 8}
        blocks = [name.removesuffix("q_proj.weight") for name in tensors if name.endswith("q_proj.weight")]
        tensors |= {f"{block}{one}_proj.bias": torch.randn(size) for block in blocks for one, size in shapes.items()}
    imported(tmp_path, tensors, settings=settings)
    export_model(tmp_path / "ours", tmp_path / "back", "mimo" if layout == "mimo" else "hf_mtp")
    found = safetensors.torch.load_file(tmp_path / "back/model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    told = json.loads((tmp_path / "back/config.json").read_text())
    assert (told["num_nextn_predict_layers"], told["num_hidden_layers"]) == (1, LAYERS)
    import_folder(tmp_path / "back", tmp_path / "again", Wanted())
    again, ours = load_model(tmp_path / "again")[1], load_model(tmp_path / "ours")[1]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


def test_modules_that_take_their_inputs_in_the_other_order_are_exported_in_deepseeks(tmp_path):
    recipe = tiny_recipe(heads={"kind": "sequential", "concatenation": "hidden_first", "num_offsets": 3})
    save_run(tmp_path / "run", recipe, 1)
    export_model(tmp_path / "run", tmp_path / "hf", "hf_mtp")
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted())
    again, model = load_model(tmp_path / "ours", dtype=torch.float64)
    assert (again.heads.concatenation, again.heads.num_offsets) == ("embedding_first", 3)
    found, expected = scores(model), scores(model_of_step(recipe, 1).double())
    for offset in (1, 2, 3):
        torch.testing.assert_close(found[offset], expected[offset])


def test_metas_layout(tmp_path):
    tensors = write_meta(tmp_path / "meta")
    import_folder(tmp_path / "meta", tmp_path / "ours", Wanted())
    recipe, model = load_model(tmp_path / "ours")
    assert (recipe.heads.kind, recipe.heads.num_offsets, recipe.model.num_hidden_layers) == ("parallel", 3, 3)
    found, expected = scores(model), meta_logits(tensors, TOKENS[:, :16])
    assert len(expected) == 3
    for offset, wanted in enumerate(expected, start=1):
        torch.testing.assert_close(found[offset], wanted, rtol=1e-5, atol=1e-5)


def test_the_folder_says_what_every_parameter_started_as(tmp_path, capsys):
    imported(tmp_path, num_offsets=2, init="copy")
    said = capsys.readouterr().out
    assert (
        "  trunk        19 loaded\n  offset 1     9 loaded\n  offset 2     9 copied\n  unembedding  2 loaded\n" in said
    )
    report = json.loads((tmp_path / "ours/import.json").read_text())
    assert report["parameters"]["heads.blocks.1.0.mlp.up_proj.weight"] == {
        "how": "copied",
        "from": "model.layers.2.mlp.up_proj.weight",
    }
    assert load_recipe(tmp_path / "ours/recipe.yaml").recipe.init.path == str(tmp_path / "ours")
