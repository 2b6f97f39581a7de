"""Tiny random decoders of transformers, with what is peculiar to each of them at work."""

from typing import Any

import torch

from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.recipe.schema.root import Recipe

COMMON: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""What most settings have in common."""
GPT = {name: COMMON[name] for name in ("vocab_size", "initializer_range", "pad_token_id")} | {
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.02}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
SLIDING = {"sliding_window": 5}

SETTINGS: dict[str, dict[str, Any]] = {
    "afmoe": EXPERTS | SLIDING | {"head_dim": 8, "num_dense_layers": 1, "global_attn_every_n_layers": 2},
    "apertus": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "gemma": {"head_dim": 8},
    "gemma2": SLIDING
    | {
        "head_dim": 8,
        "query_pre_attn_scalar": 6,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 2.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": SLIDING
    | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4},
    "phi3": SLIDING,
    "phi": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
    "olmo": {"clip_qkv": 0.5},
    "olmo2": {},
    "olmo3": SLIDING | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    "smollm3": {"no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 2},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
        "logits_scaling": 3.0,
        "tie_word_embeddings": True,
    },
    "glm": {"head_dim": 8, "partial_rotary_factor": 0.5, "attention_bias": True},
    "glm4": {"head_dim": 8, "partial_rotary_factor": 0.5, "attention_bias": True},
    "cohere": {"logit_scale": 0.3, "use_qk_norm": True, "tie_word_embeddings": True},
    "cohere2": SLIDING
    | {"logit_scale": 0.3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "starcoder2": SLIDING | {"use_bias": True, "residual_dropout": 0.1, "embedding_dropout": 0.1},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False, "bias": True},
    "mixtral": EXPERTS | ROUTED | SLIDING,
    "qwen2_moe": EXPERTS | ROUTED | {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 2},
    "qwen3_moe": EXPERTS | ROUTED | {"head_dim": 8, "norm_topk_prob": True},
    "olmoe": EXPERTS | ROUTED,
    "gpt_oss": EXPERTS | ROUTED | SLIDING | {"head_dim": 8},
    "deepseek_v2": LATENT | {"topk_method": "group_limited_greedy", "head_dim": 4},
    "deepseek_v3": LATENT,
    "qwen3_next": EXPERTS
    | {
        "num_hidden_layers": 4,
        "head_dim": 8,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 24,
    },
    "gpt2": GPT | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "tie_word_embeddings": True},
    "gptj": GPT
    | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 4, "tie_word_embeddings": False},
    "opt": GPT
    | {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "tie_word_embeddings": True,
        "init_std": 0.2,
    },
    "bloom": GPT | {"hidden_size": 32, "n_layer": 3, "n_head": 4, "tie_word_embeddings": True},
    "mpt": GPT | {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64, "tie_word_embeddings": True},
    "ctrl": GPT | {"n_embd": 32, "dff": 48, "n_layer": 3, "n_head": 4, "n_positions": 64, "tie_word_embeddings": True},
    "phimoe": EXPERTS | ROUTED | SLIDING | {"attention_bias": True, "lm_head_bias": True},
    "stablelm": {"partial_rotary_factor": 0.5, "use_parallel_residual": True, "qk_layernorm": True},
    "nemotron": {"partial_rotary_factor": 0.5, "head_dim": 8},
    "nanochat": {"head_dim": 8, "final_logit_softcapping": 3.0},
    "gemma4_text": SLIDING
    | {
        "head_dim": 8,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "final_logit_softcapping": 3.0,
        "tie_word_embeddings": True,
    },
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": SLIDING,
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5},
    "qwen3": {"head_dim": 8},
    "gpt_neox": {"rotary_pct": 0.5},
}
"""Settings by model type, beside those that are common."""
FURTHER = {
    "deepseek_v32": LATENT | {"index_head_dim": 8, "index_n_heads": 2, "index_topk": 4},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention"],  # which say how many there are
        "head_dim": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "moe_latent_size": None,
        "num_nextn_predict_layers": 0,
    },
    "bamba": {"attn_layer_indices": [1, 2], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "falcon_h1": {  # multiplies embedded tokens itself, sets buffers of its layers, and keeps two pasts for each
        "head_dim": 8,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "embedding_multiplier": 2.0,
        "lm_head_multiplier": 0.5,
        "ssm_multipliers": [1.1, 0.9, 1.2, 0.8, 1.0],
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},  # and no attention heads
    "dbrx": {  # settings of parts
        "vocab_size": 61,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "biogpt": {"pad_token_id": 1},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 8, "head_dim": 8, "logits_soft_cap": 3.0},
}
"""Settings of decoders whose layers keep more than keys and values."""
NOT_IN = {"mamba2": ("num_attention_heads", "num_key_value_heads", "intermediate_size", "max_position_embeddings")}
"""Common settings that a decoder does not have."""
WHOLE = ("gpt2", "gptj", "opt", "bloom", "mpt", "ctrl", "dbrx")
"""Those whose settings have names of their own."""


def settings_of(name: str, **changed: Any) -> dict[str, Any]:
    """Return the settings of a tiny decoder, as its config.json would say them."""
    common = {} if name in WHOLE else {key: one for key, one in COMMON.items() if key not in NOT_IN.get(name, ())}
    return {"model_type": name, **common, **(SETTINGS | FURTHER)[name], **changed}


def architecture_recipe(name: str, **sections: Any) -> Recipe:
    """A recipe of a tiny decoder with four offsets; keyword arguments overlay its sections."""
    settings = sections.pop("settings", {})
    defaults: dict[str, Any] = {
        "model": {"family": "transformers", "hf_config": settings_of(name, **settings)},
        "heads": {"num_offsets": 3, "kind": "sequential", "layers_from_trunk": False},
        "data": {"seq_len": 11},
        "batch": {"global_batch_size": 2, "micro_batch_size": 2},
    }
    for section, values in sections.items():
        defaults[section] = defaults.get(section, {}) | values if isinstance(values, dict) else values
    return Recipe.model_validate(defaults)


def judge_of(model: MtpModel) -> torch.nn.Module:
    """The same weights in transformers' own class."""
    import transformers

    architecture = model.trunk.architecture
    config = transformers.AutoConfig.for_model(**model.section.hf_config)
    attention = architecture.config._attn_implementation
    judge = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    state = {
        theirs: parameter.detach()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if (theirs := architecture.names.theirs(name))
    }
    absent, unexpected = judge.load_state_dict(state, strict=False)
    assert not unexpected
    assert not absent
    return judge
