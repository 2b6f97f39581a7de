"""What settings mean: what transformers makes of them, or the reason why the model here cannot be that."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_lightning.checkpoint.huggingface.configs import Config, rotary_fields, written_rotary
from mtp_lightning.errors import MtpError
from mtp_lightning.model.positions import rotary_tables
from mtp_lightning.recipe.schema.model import ModelSection
from tests.checkpoint.families import LINEAR, LLAMA3, PYTHIA, save_model
from tests.checkpoint.judge import edit, imported_logits, judged_logits
from tests.support.covering import some_of

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[judge]'"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
GONE = object()
OLD = {"rope_parameters": GONE}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "llama": "llama",
    "mistral": "mistral_whole_window",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gpt_neox": "gpt_neox",
}
"""A case of `tests/checkpoint/families.py` of each."""
RIGHT: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"max_position_embeddings": GONE}),
    ("llama", {"rope_parameters": GONE}),
    ("llama", OLD | {"rope_theta": 500.0}),
    ("llama", OLD | {"rope_theta": 500.0, "rope_scaling": None}),
    ("llama", OLD | {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("llama", OLD | {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2}}),
    ("llama", OLD | {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}),
    ("llama", OLD | {"rope_scaling": {"type": "default", "factor": 2.0}}),
    ("llama", OLD | {"rope_scaling": LLAMA3}),
    ("llama", OLD | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}}),
    ("llama", OLD | {"rope_scaling": YARN}),
    ("llama", OLD | {"rope_scaling": YARN | {"beta_fast": 4, "beta_slow": 0.5, "attention_factor": 1.3}}),
    ("llama", {"rope_parameters": YARN | {"rope_theta": 500.0, "factor": 0.5}}),
    ("llama", OLD | {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}}),
    ("llama", OLD | {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16}),
    ("llama", {"rope_parameters": LINEAR}),
    ("llama", {"rope_parameters": LINEAR, "rope_theta": 77.0}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rope_scaling": LINEAR}),
    ("llama", {"rope_parameters": {"rope_theta": 500.0}, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("llama", {"hidden_act": "swish"}),
    ("llama", {"hidden_act": GONE}),
    ("llama", {"rms_norm_eps": GONE}),
    ("llama", {"head_dim": GONE}),
    ("llama", {"head_dim": None}),
    ("llama", {"tie_word_embeddings": GONE, "attention_bias": GONE, "mlp_bias": GONE}),
    ("llama", {"attention_dropout": 0.1, "pretraining_tp": 2, "use_cache": False}),
    ("llama", {"pad_token_id": 0, "logits_scaling": 8.0, "auto_map": {"AutoModelForCausalLM": "x.Y"}}),
    ("llama", {"architectures": GONE}),
    ("llama", {"dtype": GONE, "torch_dtype": "bfloat16"}),
    ("llama", {"dtype": "float16", "transformers_version": "4.0.0"}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"max_position_embeddings": 4096, "sliding_window": GONE}),
    ("mistral", {"head_dim": GONE, "tie_word_embeddings": GONE}),
    ("mistral", {"attention_bias": False, "rope_parameters": GONE, "rope_theta": 1e6}),
    ("qwen2", {"max_position_embeddings": GONE}),
    ("qwen2", {"use_sliding_window": GONE, "sliding_window": 8, "layer_types": GONE}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": GONE, "max_window_layers": 3}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": GONE}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"] * 3}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention"] * 3}),
    ("qwen2", {"attention_bias": False}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": GONE, "max_window_layers": 9}),
    ("qwen3", {"tie_word_embeddings": True}),
    ("gpt_neox", {"max_position_embeddings": GONE, "layer_norm_eps": GONE}),
    ("gpt_neox", OLD | {"rotary_pct": 0.5, "rotary_emb_base": 500}),
    ("gpt_neox", OLD | {"rotary_pct": 0.5, "rope_theta": 77.0}),
    ("gpt_neox", OLD | {"rotary_pct": 1.0, "partial_rotary_factor": 0.5}),
    ("gpt_neox", OLD | {"rotary_pct": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("gpt_neox", {"rope_parameters": PYTHIA, "rotary_pct": 1.0, "rotary_emb_base": 77}),
    ("gpt_neox", {"hidden_act": "gelu_python", "hidden_dropout": 0.1, "attention_dropout": 0.1}),
    ("gpt_neox", {"use_parallel_residual": GONE, "attention_bias": GONE, "tie_word_embeddings": GONE}),
]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", OLD | {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
    ("llama", {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor must be 1.0"),
    ("llama", OLD | {"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 9.0}}, "dynamic"),
    ("llama", OLD | {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
    ("llama", OLD | {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}, "yarn"),
    ("llama", OLD | {"rope_scaling": YARN | {"truncate": False}}, "yarn"),
    ("llama", OLD | {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0]}}, "longrope"),
    ("llama", {"rope_parameters": {"rope_type": "proportional"}}, "proportional"),
    ("llama", {"rope_parameters": {"full_attention": LINEAR}}, "for each type of layer"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
    ("llama", {"sliding_window": 8}, "attend to all positions"),
    ("llama", {"attention_bias": True}, "12 missing: model.layers.0.self_attn.q_proj.bias"),
    ("llama", {"mlp_bias": True}, "9 missing: model.layers.0.mlp.gate_proj.bias"),
    ("llama", {"head_dim": 8}, "q_proj.weight [16, 16] instead of [32, 16]"),
    ("llama", {"num_hidden_layers": 2}, "9 unexpected: model.layers.2."),
    ("llama", {"num_hidden_layers": 4}, "9 missing: model.layers.3."),
    ("llama", {"num_key_value_heads": GONE}, "k_proj.weight [8, 16] instead of [16, 16]"),
    ("llama", {"num_key_value_heads": 3}, "3 key and value heads for 4 query heads"),
    ("llama", {"vocab_size": 16}, "[13, 16] instead of [16, 16]"),
    ("llama", {"model_type": "mixtral"}, "pip install 'mtp_lightning[transformers]'"),
    ("llama", {"model_type": GONE, "architectures": GONE}, "pip install 'mtp_lightning[transformers]'"),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "by the method gptq"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "by the method fp8"),
    ("llama", {"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ("llama", {"quantization_config": {"load_in_4bit": True}}, "by the method unknown"),
    ("llama", {"quantization": {"group_size": 64, "bits": 4}}, "weights quantized"),
    ("mistral", {"sliding_window": 8}, "a sliding_window of 8 for 64 positions"),
    ("mistral", {"sliding_window": GONE, "max_position_embeddings": GONE}, "of 4096 for 131072 positions"),
    ("mistral", {"sliding_window": GONE, "max_position_embeddings": 8192}, "of 4096 for 8192 positions"),
    ("mistral", {"num_key_value_heads": GONE}, "8 key and value heads for 4 query heads"),
    ("mistral", {"sliding_window": 8, "layer_types": ["full_attention"] * 3}, "of 8 for 64"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": GONE, "max_window_layers": 2}, "of 8"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 3}, "of 8"),
    ("qwen2", {"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "linear_attention"),
    ("qwen3", {"head_dim": GONE}, "instead of [512, 16]"),
    ("qwen3", {"attention_bias": True}, "12 missing: "),
    ("gpt_neox", {"hidden_act": "gelu_new"}, "hidden_act must be 'gelu'"),
    ("gpt_neox", {"attention_bias": False}, "6 unexpected: gpt_neox.layers.0.attention"),
]


def named(case: Any) -> str | None:
    if not isinstance(case, dict):
        return None if case is GONE else str(case)[:20]
    return ",".join(f"{name}-{'gone' if value is GONE else str(value)[:20]}" for name, value in case.items())[:60]


def test_yarn_is_written_as_it_was_read() -> None:
    told = YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "attention_factor": 1.5}
    section = ModelSection(**rotary_fields(Config(Path("config.json"), {"rope_scaling": told, "rope_theta": 500.0})))
    assert written_rotary(section) == {"rope_theta": 500.0, "rope_scaling": told}


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["linear", "ntk", "dynamic", "llama3", "yarn"])
def test_written_scalings_turn_as_here(kind: str, share: float) -> None:
    """In each of transformers' functions, over all positions that a model is meant for."""
    scaling = {"kind": kind, "factor": 4.0, "original_positions": 16}
    section = ModelSection.model_validate(
        {"rope_scaling": scaling, "max_position_embeddings": 64, "partial_rotary_factor": share, "rope_theta": 500.0}
    )
    told = written_rotary(section)
    parameters = (told["rope_scaling"] or {"rope_type": "default"}) | {"rope_theta": told["rope_theta"]}
    config = transformers.GPTNeoXConfig(
        hidden_size=256,
        num_attention_heads=8,
        max_position_embeddings=64,
        rope_parameters=parameters | {"partial_rotary_factor": share},
    )
    positions, like = torch.arange(64)[None], torch.zeros(())
    theirs = transformers.models.gpt_neox.modeling_gpt_neox.GPTNeoXRotaryEmbedding(config)(like, positions)
    for ours, their in zip(rotary_tables(positions, section, like=like), theirs, strict=True):
        torch.testing.assert_close(ours[:, 0], their, rtol=0, atol=1e-5)
    if kind == "ntk":  # the slowest pair turns by a factor slower, the fastest as before [bloc97]
        plain = rotary_tables(positions * 4, section.model_copy(update={"rope_scaling": None}), like=like)[1]
        slow = rotary_tables(positions * 16, section, like=like)[1]
        last = section.rotary_width // 2 - 1
        torch.testing.assert_close(slow[..., last], plain[..., last], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for family, case in FAMILIES.items():
        save_model(transformers, case, folder / family)
    return folder


def changed(saved: Path, family: str, changes: dict[str, Any], folder: Path) -> Path:
    shutil.copytree(saved / family, folder)
    gone = [name for name, value in changes.items() if value is GONE]
    edit(folder, *gone, **{name: value for name, value in changes.items() if value is not GONE})
    return folder


@pytest.mark.parametrize(("family", "changes"), some_of(RIGHT, one_in=4), ids=named)
def test_settings_mean_what_they_mean_in_transformers(
    family: str, changes: dict[str, Any], saved: Path, tmp_path: Path
) -> None:
    folder = changed(saved, family, changes, tmp_path / "hf")
    expected = judged_logits(transformers, folder)
    torch.testing.assert_close(imported_logits(folder), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "changes", "found"), REFUSED, ids=named)
def test_settings_of_another_model_are_refused_by_name(
    family: str, changes: dict[str, Any], found: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # which could open some of them
    folder = changed(saved, family, changes, tmp_path / "hf")
    with pytest.raises(MtpError) as failure:
        imported_logits(folder)
    assert found in str(failure.value)
    assert all((failure.value.expected, failure.value.found, failure.value.hint))


@pytest.mark.parametrize(("family", "changes", "found"), some_of(REFUSED, one_in=2), ids=named)
def test_or_they_are_taken_as_transformers_takes_them(
    family: str, changes: dict[str, Any], found: str, saved: Path, tmp_path: Path
) -> None:
    folder = changed(saved, family, changes, tmp_path / "hf")
    try:
        expected = judged_logits(transformers, folder)
    except Exception as error:
        pytest.skip(f"transformers cannot run it: {error}"[:80])
    try:
        logits = imported_logits(folder)
    except MtpError:
        return  # refused all the same
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_dropout_that_is_not_applied_is_told(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = changed(saved, "gpt_neox", {"hidden_dropout": 0.25}, tmp_path / "hf")
    imported_logits(folder)
    assert "hidden_dropout is 0.25; the trunk here has no dropout" in capsys.readouterr().out
    assert "hidden_dropout is 0.25" in json.loads((tmp_path / "hf-ours/import.json").read_text())["notes"][0]
