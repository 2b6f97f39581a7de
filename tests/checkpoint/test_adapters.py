"""LoRA adapters on import: what PEFT's own merge computes, or the reason why not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.errors import MtpError
from tests.checkpoint.families import save_model
from tests.checkpoint.judge import TOKENS, imported_logits
from tests.support.covering import some_of

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[judge]'"
)
peft = pytest.importorskip("peft", reason="needs peft: pip install 'mtp_lightning[judge]'")
pytestmark = pytest.mark.filterwarnings("ignore")
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "every matrix": ("llama", {"target_modules": ALL, "r": 3, "lora_alpha": 7}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "a pattern of modules": ("llama", {"target_modules": r".*layers\.[01]\.mlp\.(up|down)_proj"}),
    "rslora": ("llama", {"target_modules": ALL, "r": 4, "use_rslora": True}),
    "ranks by module": ("llama", {"target_modules": ALL, "rank_pattern": {"q_proj": 5, r"layers.1.mlp.up_proj": 1}}),
    "scales by module": (
        "llama",
        {"target_modules": ALL, "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 32, r"layers\.[12]\..*_proj": 3}},
    ),
    "both by module": (
        "llama",
        {"target_modules": ALL, "rank_pattern": {"down_proj": 6}, "alpha_pattern": {"(q|k|v)_proj": 1, "up_proj": 40}},
    ),
    "some layers": ("llama", {"target_modules": ALL, "layers_to_transform": [0, 2]}),
    "one layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    "modules left out": ("llama", {"target_modules": ALL, "exclude_modules": ["v_proj"]}),
    "fan in fan out": ("llama", {"target_modules": ALL, "fan_in_fan_out": True}),
    "a trained unembedding": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "trained norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm", "embed_tokens"]}),
    "an updated embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "an updated unembedding": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "trained biases": ("llama_biased", {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}),
    "all biases": ("llama_biased", {"target_modules": ["q_proj"], "bias": "all"}),
    "dropout": ("llama", {"target_modules": ["q_proj"], "lora_dropout": 0.3}),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
    "qwen2": ("qwen2", {"target_modules": ALL}),
    "qwen2, tied": ("qwen2_tied", {"target_modules": ALL}),
    "qwen3": ("qwen3", {"target_modules": ALL}),
    "mistral": ("mistral", {"target_modules": ALL}),
    "tied, a trained unembedding": ("qwen2_tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tied, a trained embedding": ("qwen2_tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "fused matrices": ("gpt_neox", {"target_modules": ["query_key_value", "dense", "dense_h_to_4h"]}),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "found use_dora"),
    "lora bias": ({"lora_bias": True}, "found lora_bias"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights pissa, which changes the base"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights olora"),
    "trained tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "layers repeated": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    "parameters": ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "activated": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "what comes later": ({"use_xlora2": True}, "use_xlora2"),
    "ia3": ({"peft_type": "IA3"}, "found IA3"),
    "prefix": ({"peft_type": "PREFIX_TUNING"}, "found PREFIX_TUNING"),
    "no type": ({"peft_type": None}, "found nothing"),
    "an odd type": ({"peft_type": ["LORA"]}, "found a list"),
    "another rank": ({"r": 3}, "must be of rank 3"),
    "rank 0": ({"r": 0}, "must be of rank 0"),
    "a rank of text": ({"r": "two"}, "must be of rank 'two'"),
    "a rank of yes": ({"r": True}, "must be of rank True"),
    "a rank of 10^9": ({"r": 10**9}, "must be of rank 1000000000"),
    "an alpha of text": ({"lora_alpha": "x"}, "lora_alpha: 'x'"),
    "an alpha of lists": ({"lora_alpha": [1]}, "lora_alpha: a list"),
    "patterns of lists": ({"rank_pattern": [1]}, "rank_pattern: a list"),
    "a pattern without end": ({"alpha_pattern": {"(a+)+": 1}}, "alpha_pattern must name modules"),
    "a long pattern": ({"alpha_pattern": {".*.*.*.*.*.*q": 1}}, "alpha_pattern must name modules"),
    "a pattern of many choices": ({"alpha_pattern": {"(a|a)" * 30: 1}}, "alpha_pattern must name modules"),
    "a pattern of many leaves": ({"alpha_pattern": {"a?" * 30 + "a" * 30: 1}}, "alpha_pattern must name modules"),
    "a pattern that is none": ({"rank_pattern": {"[": 1}}, "rank_pattern must name modules"),
    "a base elsewhere": ({"base_model_name_or_path": "someone/model"}, "'someone/model'"),
    "no base": ({"base_model_name_or_path": None}, "base_model_name_or_path null"),
    "an odd base": ({"base_model_name_or_path": "a\0b"}, "must be a folder here"),
    "a long base": ({"base_model_name_or_path": "x" * 5000}, "must be a folder here"),
}
Tensors = dict[str, Tensor]
Q = "base_model.model.model.layers.0.self_attn.q_proj"
ODD_WEIGHTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "one factor": (lambda one: {k: v for k, v in one.items() if k != f"{Q}.lora_B.weight"}, "with one of two factors"),
    "of another model": (lambda one: {k.replace("layers.0", "layers.9"): v for k, v in one.items()}, "layers.9"),
    "no prefix": (lambda one: {k.removeprefix("base_model."): v for k, v in one.items()}, "model.model.layers.0"),
    "a magnitude": (lambda one: one | {f"{Q}.lora_magnitude_vector": torch.ones(16)}, "lora_magnitude_vector"),
    "nothing": (lambda one: {}, "of 0"),
    "NaN": (lambda one: one | {f"{Q}.lora_A.weight": torch.full((2, 16), torch.nan)}, "32 NaN or infinite"),
    "another width": (lambda one: one | {f"{Q}.lora_A.weight": torch.ones(2, 15)}, "[[2, 15], [16, 2]]"),
    "a vector": (lambda one: one | {f"{Q}.lora_A.weight": torch.ones(2)}, "[[2], [16, 2]]"),
    "whole numbers": (lambda one: one | {f"{Q}.lora_A.weight": torch.ones(2, 16, dtype=torch.int8)}, "int8"),
    "a norm of another width": (lambda one: one | {"base_model.model.model.norm.weight": torch.ones(8)}, "[8] instead"),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for case in {case for case, _ in RIGHT.values()}:
        save_model(transformers, case, folder / case)
    return folder


def adapt(base: Path, out: Path, **options: Any) -> Any:
    """Save a random adapter of a base; return the model with it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(**({"task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 6} | options))
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter += 0.2 * torch.randn(parameter.shape)
    adapted.save_pretrained(out)
    return adapted


@torch.no_grad()
def merged_logits(adapter: Path, base: Path) -> Tensor:
    """Score TOKENS with what PEFT makes of an adapter."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    logits: Tensor = merged.eval()(TOKENS).logits
    return logits


@pytest.mark.parametrize("case", some_of(RIGHT, one_in=4))
def test_an_adapter_is_merged_as_by_peft(case: str, bases: Path, tmp_path: Path) -> None:
    name, options = RIGHT[case]
    adapt(bases / name, tmp_path / "adapter", **options)
    expected = merged_logits(tmp_path / "adapter", bases / name)
    plain = transformers.AutoModelForCausalLM.from_pretrained(bases / name, dtype=torch.float32)
    assert (expected - plain(TOKENS).logits).abs().max() > 1e-3
    torch.testing.assert_close(imported_logits(tmp_path / "adapter"), expected, rtol=1e-5, atol=2e-5)


@pytest.fixture(scope="module")
def adapter(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    adapt(bases / "llama", folder, target_modules=["q_proj", "v_proj"])
    return folder


def refusal(folder: Path, **wanted: Any) -> str:
    with pytest.raises(MtpError) as failure:
        imported_logits(folder, **wanted)
    assert all((failure.value.expected, failure.value.found, failure.value.hint))
    assert not [*folder.parent.glob(f"{folder.name}-ours*")]
    assert len(str(failure.value)) < 2000
    return str(failure.value)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_plain_lora_is_refused_by_name(case: str, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / SETTINGS
    changes, found = REFUSED[case]
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert found in refusal(tmp_path / "adapter")


@pytest.mark.parametrize("case", ODD_WEIGHTS)
def test_tensors_that_do_not_fit_are_named(case: str, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / WEIGHTS
    change, found = ODD_WEIGHTS[case]
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)
    assert found in refusal(tmp_path / "adapter")


def test_files_of_an_adapter_that_are_none(adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])
    assert "for shape" in refusal(folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    assert "'adapter_model.safetensors')" in refusal(folder)
    (folder / "adapter_model.bin").unlink()
    assert "must hold adapter_model.safetensors" in refusal(folder)
    (folder / SETTINGS).write_bytes(b"[" * 100_000)
    assert "nested too deep" in refusal(folder)


def test_the_base_can_be_given(bases: Path, adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    path = folder / SETTINGS
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "someone/model"}))
    expected = merged_logits(folder, bases / "llama")
    torch.testing.assert_close(imported_logits(folder, base=bases / "llama"), expected, rtol=1e-5, atol=2e-5)
    report = json.loads((tmp_path / "adapter-ours/import.json").read_text())
    assert f"Merged the adapter {folder}: 6 matrices updated, 0 tensors replaced" in report["notes"]
    assert "--base belongs to an adapter" in refusal(bases / "llama", base=bases / "llama")
    shutil.rmtree(tmp_path / "adapter-ours")
    assert "must belong to one of its base" in refusal(folder, base=bases / "gpt_neox")


def test_new_rows_are_the_mean_of_updated_ones(bases: Path, tmp_path: Path) -> None:
    adapt(bases / "llama", tmp_path / "adapter", target_modules=["embed_tokens"])
    expected = merged_logits(tmp_path / "adapter", bases / "llama")
    found = imported_logits(tmp_path / "adapter", vocabulary=20)
    torch.testing.assert_close(found[..., :13], expected, rtol=1e-5, atol=2e-5)
    matrix = load_model(tmp_path / "adapter-ours")[1].trunk.embed_tokens.weight
    torch.testing.assert_close(matrix[13:], matrix[:13].mean(0).expand(7, -1), rtol=1e-5, atol=1e-6)


def test_an_adapter_in_the_cache_of_the_hub(adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--someone--adapter"
    shutil.copytree(adapter, folder / "snapshots/abc")
    imported_logits(folder)
    report = json.loads((tmp_path / f"{folder.name}-ours/import.json").read_text())
    assert report["notes"] == [f"Merged the adapter {folder}/snapshots/abc: 6 matrices updated, 0 tensors replaced"]


def test_a_base_that_is_tied_has_one_matrix(bases: Path, tmp_path: Path) -> None:
    adapt(bases / "qwen2_tied", tmp_path / "adapter", target_modules=["lm_head"])
    assert "the embedding and the unembedding" in refusal(tmp_path / "adapter")


def test_a_vocabulary_that_grew_with_the_adapter(bases: Path, tmp_path: Path) -> None:
    shutil.copytree(bases / "llama", tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model.resize_token_embeddings(20)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    logits = imported_logits(tmp_path / "adapter")
    assert logits.shape[-1] == 20
    torch.testing.assert_close(logits, adapted.merge_and_unload().eval()(TOKENS).logits, rtol=1e-5, atol=2e-5)
    assert load_model(tmp_path / "adapter-ours")[0].model.vocab_size == 20
