"""Files of llama.cpp, judged by the models that they were made of, the package gguf and transformers."""

import json

import numpy as np
import pytest
import torch

from mtp_lightning.checkpoint.huggingface.gguf_model import open_gguf
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from tests.checkpoint.judge import TOKENS, imported_logits

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[judge]'"
)
gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'mtp_lightning[gguf]'")
from tests.checkpoint.gguf_models import CASES, TYPES, model_of, save_gguf  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
QUICK = [*((case, "Q8_0") for case in CASES), *(("llama", kind) for kind in TYPES if kind != "Q8_0")]
SLOW = [(case, kind) for case in CASES for kind in TYPES if (case, kind) not in QUICK]
FORMS = [*QUICK, *(pytest.param(*form, marks=pytest.mark.slow) for form in SLOW)]
UNWRITTEN = [
    kind.name
    for kind in gguf.GGMLQuantizationType
    if kind.name.startswith(("Q", "IQ", "TQ")) and kind.name not in (*TYPES, "Q8_1", "Q8_K", "Q1_0")
]


@torch.no_grad()
def logits_of(model):
    return model(TOKENS).logits


@pytest.mark.parametrize(("case", "kind"), FORMS)
def test_logits_are_those_of_the_dequantised_model(case, kind, tmp_path):
    judge = save_gguf(model_of(transformers, case), case, tmp_path / "a.gguf", kind)
    torch.testing.assert_close(imported_logits(tmp_path / "a.gguf"), logits_of(judge), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["llama", "llama_without_groups", "llama_tied", "qwen2", "qwen2_tied", "qwen3"])
def test_logits_and_settings_are_those_of_transformers(case, tmp_path):
    changes = {"head_dim": 128} if case == "qwen3" else {}  # transformers reads no other here
    save_gguf(model_of(transformers, case, **changes), case, tmp_path / "a.gguf", "Q4_0")
    judge = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", dtype=torch.float32).eval()
    torch.testing.assert_close(imported_logits(tmp_path / "a.gguf"), logits_of(judge), rtol=1e-5, atol=1e-5)
    (tmp_path / "made").mkdir()
    told = json.loads((open_gguf(tmp_path / "a.gguf", tmp_path / "made").made_files / "config.json").read_text())
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"):
        assert told[name] == getattr(judge.config, name)
    assert told["vocab_size"] == judge.config.vocab_size
    assert told["rms_norm_eps"] == pytest.approx(judge.config.rms_norm_eps)
    assert told["tie_word_embeddings"] == judge.config.tie_word_embeddings


@pytest.mark.parametrize("kind", UNWRITTEN)
def test_values_of_types_that_are_only_read(kind, tmp_path):
    values_per_block, bytes_per_block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    width = max(values_per_block, 64)
    case = "llama"
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**CASES[case][2] | {"hidden_size": width, "num_hidden_layers": 1})
    )
    packed = np.random.default_rng(0).integers(0, 48, (13, width // values_per_block * bytes_per_block), np.uint8)
    embedding = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
    save_gguf(model, case, tmp_path / "a.gguf", packed={"token_embd.weight": (packed, kind)})
    (tmp_path / "made").mkdir()
    found = open_gguf(tmp_path / "a.gguf", tmp_path / "made").read("token_embd.weight")
    assert np.isfinite(embedding).all()
    assert embedding.std() > 0
    assert np.array_equal(found.numpy(), embedding)


def test_blocks_of_a_large_tensor_fit_together(tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CASES["llama"][2] | {"vocab_size": 40_000}))
    save_gguf(model, "llama", tmp_path / "a.gguf", "Q5_1")
    (tmp_path / "made").mkdir()
    opened = open_gguf(tmp_path / "a.gguf", tmp_path / "made")
    assert len([*opened.blocks("token_embd.weight")]) > 1
    assert torch.equal(opened.read("token_embd.weight"), model.model.embed_tokens.weight)


def test_a_model_in_several_files(tmp_path):
    judge = save_gguf(model_of(transformers, "qwen2"), "qwen2", tmp_path / "a.gguf", "Q8_0", split_max_tensors=10)
    paths = sorted(tmp_path.glob("*.gguf"))
    assert len(paths) > 2
    for path in (paths[0], paths[2]):
        torch.testing.assert_close(imported_logits(path), logits_of(judge), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_heads_on_it(kind, tmp_path, capsys):
    save_gguf(model_of(transformers, "llama"), "llama", tmp_path / "a.gguf", "Q4_1")
    import_folder(tmp_path / "a.gguf", tmp_path / "ours", Wanted(num_offsets=3, kind=kind))
    said = capsys.readouterr().out
    assert "The weights were quantised (16 Q4_1, 5 F32 tensors)" in said
    assert "not what it was quantised from" in said
