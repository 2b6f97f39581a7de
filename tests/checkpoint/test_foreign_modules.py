"""Modules beside decoders of transformers' own classes (MLA, experts, gated attention) come in as heads and go back."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.export.merge_into import merge_into
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.errors import CheckpointError
from mtp_lightning.evaluation.export_parity import check_parity
from mtp_lightning.model.transformers_library import library
from tests.checkpoint.runs import save_run
from tests.checkpoint.test_foreign_folders import TOKENS, save, tensors_of
from tests.support.architectures import SETTINGS, settings_of

transformers = pytest.importorskip("transformers", minversion="5.23", reason="needs transformers 5.23")
PARTS = ("enorm", "hnorm", "eh_proj", "norm")
DEEPSEEK = dict(zip(PARTS, ("enorm", "hnorm", "eh_proj", "shared_head.norm"), strict=True))
QWEN = dict(zip(PARTS, ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"), strict=True))
GATED = {"head_dim": 8, "layer_types": ["full_attention"] * 3, "attn_output_gate": True}
CASES = {
    "deepseek_v3": {},
    "glm4_moe": {name: SETTINGS["deepseek_v3"][name] for name in ("n_routed_experts", "n_group", "topk_group")}
    | {"num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1}
    | {"head_dim": 8},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "qwen3_5_text": GATED,
}


def norms_and_map(width):
    made = {name: torch.randn(width) * 0.1 + 1 for name in ("enorm.weight", "hnorm.weight", "norm.weight")}
    return made | {"eh_proj.weight": torch.randn(width, 2 * width) * 0.2}


def write_with_module(folder, name, dtype=torch.float32, **saving):
    """Save a random decoder; its module's layer is the last layer of one that has one layer more of that kind."""
    settings = settings_of(name) | CASES[name] if name in SETTINGS else settings_of("llama") | CASES[name]
    settings |= {"model_type": name}
    torch.manual_seed(0)
    config = library().AutoConfig.for_model(**settings)
    save(folder, library().AutoModelForCausalLM.from_config(config), dtype=dtype, **saving)
    last = f"model.layers.{config.num_hidden_layers - 1}."
    generator = torch.Generator().manual_seed(5)
    layer = {
        one.removeprefix(last): value + (0.05 * torch.randn(value.shape, generator=generator)).to(value.dtype)
        for one, value in tensors_of(folder).items()
        if one.startswith(last)
    }
    prefix = f"model.layers.{config.num_hidden_layers}." if name in ("deepseek_v3", "glm4_moe") else "mtp."
    names = QWEN if prefix == "mtp." else DEEPSEEK
    if prefix == "mtp.":
        layer = {f"layers.0.{one}": value for one, value in layer.items()}
    outside = {f"{names[one.split('.')[0]]}.weight": value.to(dtype) for one, value in norms_and_map(32).items()}
    module = {f"{prefix}{one}": value for one, value in (outside | layer).items()}
    files = sorted(folder.glob("*.safetensors"))
    kept = safetensors.torch.load_file(files[-1])
    safetensors.torch.save_file(kept | module, files[-1], metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        told = json.loads(index.read_text())
        told["weight_map"] |= dict.fromkeys(module, files[-1].name)
        index.write_text(json.dumps(told))
    return module


@torch.no_grad()
def by_hand(folder, module):
    """Scores of the second offset, by transformers' own layer on its own trunk."""
    transformers.logging.set_verbosity_error()
    model = library().AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kept = {}
    hook = model.model.layers[-1].register_forward_pre_hook(lambda _, __, told: kept.update(told), with_kwargs=True)
    state = model.model(TOKENS, use_cache=False).last_hidden_state
    hook.remove()
    is_qwen = "mtp.fc.weight" in module
    enorm, hnorm, projection, norm = [*(QWEN if is_qwen else DEEPSEEK).values()]
    prefix = "mtp." if is_qwen else f"model.layers.{model.config.num_hidden_layers}."

    def normed(name, value):
        made = type(model.model.norm)(value.shape[-1], eps=model.config.rms_norm_eps)
        made.weight.copy_(module[f"{prefix}{name}.weight"])
        return made(value)

    pair = torch.cat((normed(enorm, model.model.embed_tokens(TOKENS.roll(-1, 1))), normed(hnorm, state)), -1)
    hidden = pair @ module[f"{prefix}{projection}.weight"].T
    block, last = prefix + "layers.0." * is_qwen, f"model.layers.{model.config.num_hidden_layers - 1}."
    whole = {one: value for one, value in tensors_of(folder).items() if one not in module}
    whole |= {one: module[block + one.removeprefix(last)] for one in whole if one.startswith(last)}
    swapped = shutil.copytree(folder, folder.with_name("swapped"))
    safetensors.torch.save_file(whole, swapped / "model.safetensors", metadata={"format": "pt"})
    layer = library().AutoModelForCausalLM.from_pretrained(swapped, dtype=torch.float32).eval().model.layers[-1]
    made = layer(hidden, **kept)
    return model.lm_head(normed(norm, made[0] if isinstance(made, tuple) else made))[:, :-2]


@pytest.mark.parametrize("name", CASES)
def test_a_module_computes_as_transformers_own_layer_does(name, tmp_path):
    module = write_with_module(tmp_path / "hf", name)
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted())
    recipe, model = load_model(tmp_path / "ours")
    assert (recipe.model.family, recipe.heads.kind, recipe.heads.num_offsets) == ("transformers", "sequential", 2)
    padded = torch.nn.functional.pad(TOKENS, (0, 2))
    with torch.no_grad():
        state = model.hidden_states(padded, torch.zeros_like(padded))[2]
        found = model.unembedding.logits(2, state)[:, :-2]
    expected = by_hand(tmp_path / "hf", module)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_it_goes_back_and_nothing_else_changes(name, tmp_path):
    module = write_with_module(tmp_path / "hf", name, dtype=torch.bfloat16, max_shard_size="20KB")
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted())
    recipe, model = load_model(tmp_path / "ours", dtype=torch.float32)
    with torch.no_grad():
        for one, parameter in model.named_parameters():
            if one.startswith("heads.") or one == "unembedding.norms.1.weight":
                parameter += 0.02 * torch.randn(parameter.shape)
    save_run(tmp_path / "run", recipe, 3, model=model)
    merge_into(tmp_path / "run", tmp_path / "hf", tmp_path / "out", check=check_parity)
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {one for one, value in before.items() if not torch.equal(after[one], value)}
    assert changed == {*module}
    with torch.no_grad():
        dict(model.named_parameters())["trunk.decoder.embed_tokens.weight"][0, 0] += 1
    save_run(tmp_path / "run", recipe, 4, model=model)
    with pytest.raises(CheckpointError, match=r"others in 1 of \d+ tensors: model.embed_tokens.weight"):
        merge_into(tmp_path / "run", tmp_path / "hf", tmp_path / "again")


def test_other_heads_may_be_put_beside_them(tmp_path):
    write_with_module(tmp_path / "hf", "deepseek_v3")
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted(num_offsets=3, kind="medusa", init="random"))
    assert load_model(tmp_path / "ours")[0].heads.kind == "medusa"
