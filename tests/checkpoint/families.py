"""Tiny random models of every family, as transformers saves them."""

from pathlib import Path
from typing import Any

import torch

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 13,
    "max_position_embeddings": 64,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
PYTHIA = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED | {"rms_norm_eps": 1e-5}),
    "llama_without_groups": ("Llama", SMALL),
    "llama3": ("Llama", GROUPED | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama_linear": ("Llama", GROUPED | {"rope_parameters": LINEAR}),
    "llama_biased": ("Llama", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama_wide_heads": ("Llama", GROUPED | {"head_dim": 6}),
    "mistral": ("Mistral", GROUPED | {"sliding_window": None, "head_dim": 6}),
    "mistral_whole_window": ("Mistral", GROUPED | {"sliding_window": 64}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen2_tied": ("Qwen2", GROUPED | {"tie_word_embeddings": True, "rope_parameters": LINEAR}),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 6, "tie_word_embeddings": True}),
    "qwen3_biased": ("Qwen3", GROUPED | {"head_dim": 4, "attention_bias": True}),
    "gpt_neox": ("GPTNeoX", SMALL | {"rope_parameters": PYTHIA}),
    "gpt_neox_serial": ("GPTNeoX", SMALL | {"rope_parameters": PYTHIA, "use_parallel_residual": False}),
    "gpt_neox_unbiased": ("GPTNeoX", SMALL | {"rope_parameters": PYTHIA, "attention_bias": False}),
    "gpt_neox_scaled": ("GPTNeoX", SMALL | {"rope_parameters": LINEAR | {"partial_rotary_factor": 1.0}}),
    "gpt_neox_tied": ("GPTNeoX", SMALL | {"rope_parameters": PYTHIA, "tie_word_embeddings": True}),
}


def save_model(transformers: Any, case: str, folder: Path, *, dtype: torch.dtype = torch.float32, **saving: Any) -> Any:
    """Save a model of a case with noise on every parameter, and return it."""
    name, options = CASES[case]
    config = getattr(transformers, f"{name}Config")(**options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    model.to(dtype).save_pretrained(folder, **saving)
    return model
