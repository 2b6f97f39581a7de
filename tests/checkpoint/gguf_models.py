"""Tiny random models as files of llama.cpp: names by its own table, turned and joined as its converter does."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from tests.checkpoint.families import LINEAR, LLAMA3, PYTHIA

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 13,
    "max_position_embeddings": 64,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
NEOX = SMALL | {"rope_parameters": PYTHIA}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", GROUPED | {"rms_norm_eps": 1e-5}),
    "llama_without_groups": ("llama", "Llama", SMALL),
    "llama_tied": ("llama", "Llama", GROUPED | {"tie_word_embeddings": True}),
    "llama3": ("llama", "Llama", GROUPED | {"rope_parameters": LLAMA3}),
    "llama_linear": ("llama", "Llama", GROUPED | {"rope_parameters": LINEAR}),
    "llama_biased": ("llama", "Llama", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("llama", "Mistral", GROUPED | {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", "Qwen2", GROUPED),
    "qwen2_tied": ("qwen2", "Qwen2", GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", "Qwen3", GROUPED | {"head_dim": 16, "tie_word_embeddings": True}),
    "gptneox": ("gptneox", "GPTNeoX", NEOX),
    "gptneox_serial": ("gptneox", "GPTNeoX", NEOX | {"use_parallel_residual": False}),
}
"""By name: architecture of llama.cpp, class of transformers and its settings."""
TYPES = [
    kind.name
    for kind in gguf.GGMLQuantizationType
    if kind.name in ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"]
]
"""What the package gguf can write in blocks of 32 or fewer values."""


def model_of(transformers: Any, case: str, **changes: Any) -> Any:
    """Build a model with noise on every parameter."""
    _, name, options = CASES[case]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**options | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return model.eval()


def save_gguf(
    model: Any, case: str, path: Path, kind: str = "F32", *, keys: Any = None, packed: Any = None, **writing: Any
) -> Any:
    """Write a model as a file, its matrices as one type, and give it the values that the file holds.

    Args:
        model: of transformers.
        case: its name.
        path: file to write.
        kind: name of the type of matrices; vectors stay in F32.
        keys: more keys with their values, None to leave one out, without the architecture's name where that is theirs.
        packed: bytes of some tensors with their type, which the model does not get.
        writing: how the library's writer splits it.
    """
    architecture = CASES[case][0]
    writer = gguf.GGUFWriter(path, architecture, **writing)
    settings = _settings(model.config, architecture) | (keys or {})
    for key, value in settings.items():
        full = key if key.startswith(("general.", "tokenizer.", "split.")) else f"{architecture}.{key}"
        if isinstance(value, list):
            writer.add_array(full, value)
        elif value is not None:
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            add[type(value)](full, value)
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture), 9)
    state = model.state_dict()
    for name, value in state.items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored, name
        if stored in (packed or {}):
            values, number = packed[stored]
            writer.add_tensor(stored, values, raw_dtype=gguf.GGMLQuantizationType[number])
            continue
        turned = _turned(value.numpy(), name, model.config, architecture)
        back = _add(writer, stored, turned, kind if value.dim() > 1 else "F32")
        value.copy_(torch.from_numpy(_turned(back, name, model.config, architecture, back=True)))
    if (rope := model.config.rope_parameters)["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(rope, model.config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add(writer: Any, name: str, value: Any, kind: str) -> Any:
    number = gguf.GGMLQuantizationType[kind]
    if kind == "F32":
        writer.add_tensor(name, value)
        return value
    packed = gguf.quantize(value, number)
    writer.add_tensor(name, packed, raw_dtype=number)
    return gguf.dequantize(packed, number).reshape(value.shape)


def _settings(config: Any, architecture: str) -> dict[str, Any]:
    heads, rope = config.num_attention_heads, config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    told = {
        "general.name": config.model_type,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "vocab_size": config.vocab_size,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] == "linear":
        told |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if architecture == "gptneox":
        return told | {
            "attention.layer_norm_epsilon": config.layer_norm_eps,
            "rope.dimension_count": int(head_dim * rope["partial_rotary_factor"]),
            "use_parallel_residual": config.use_parallel_residual,
        }
    if head_dim * heads != config.hidden_size:
        told |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    return told | {
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": head_dim,
    }


def _turned(value: Any, name: str, config: Any, architecture: str, *, back: bool = False) -> Any:
    """Order rows as the converter of llama.cpp does, or back."""
    heads, rest = config.num_attention_heads, value.shape[1:]
    if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
        num = heads if "q_proj" in name else config.num_key_value_heads
        shape = (num, -1, 2, *rest) if back else (num, 2, value.shape[0] // num // 2, *rest)
        return np.ascontiguousarray(value.reshape(shape).swapaxes(1, 2)).reshape(value.shape)
    if "query_key_value" in name:
        shape = (3, heads, -1, *rest) if back else (heads, 3, value.shape[0] // heads // 3, *rest)
        return np.ascontiguousarray(value.reshape(shape).swapaxes(0, 1)).reshape(value.shape)
    return value


def _llama3_factors(rope: Any, config: Any) -> Any:
    head_dim = config.hidden_size // config.num_attention_heads
    window, low, high = (rope[f] for f in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    factors = []
    for place in range(0, head_dim, 2):
        length = 2 * np.pi * rope["rope_theta"] ** (place / head_dim)
        smooth = (window / length - low) / (high - low)
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1 if length < window / high else rope["factor"] if length > window / low else between)
    return np.array(factors, np.float32)
