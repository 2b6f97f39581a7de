"""Tensors that SGLang 0.5.23's loaders ask for, by name and shape, written down from their parameters and mappings.

A name that a loader does not know is skipped in silence there, and one that is missing leaves what memory held: both
show here only.
"""

from typing import Any

Shapes = dict[str, tuple[int, ...]]


def _head_dim(told: dict[str, Any]) -> int:
    """Qwen2's settings do not name it."""
    return int(told.get("head_dim") or told["hidden_size"] // told["num_attention_heads"])


def _attention(told: dict[str, Any], prefix: str, *, reads: int, gated: bool = False) -> Shapes:
    """`qkv_proj` and `o_proj`, by the names that are stacked into them."""
    heads, shared, size = told["num_attention_heads"], told["num_key_value_heads"], _head_dim(told)
    return {
        f"{prefix}self_attn.q_proj.weight": (heads * size * (2 if gated else 1), reads),
        f"{prefix}self_attn.k_proj.weight": (shared * size, reads),
        f"{prefix}self_attn.v_proj.weight": (shared * size, reads),
        f"{prefix}self_attn.o_proj.weight": (told["hidden_size"], heads * size),
    }


def _mlp(told: dict[str, Any], prefix: str) -> Shapes:
    width, inside = told["hidden_size"], told["intermediate_size"]
    return {
        f"{prefix}mlp.gate_proj.weight": (inside, width),
        f"{prefix}mlp.up_proj.weight": (inside, width),
        f"{prefix}mlp.down_proj.weight": (width, inside),
    }


def _norms(told: dict[str, Any], prefix: str, *names: str) -> Shapes:
    return {f"{prefix}{name}.weight": (told["hidden_size"],) for name in names}


LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")


def eagle3(told: dict[str, Any]) -> Shapes:
    """`llama_eagle3.py`: `midlayer` is `layers.0`, which reads embedding and state; no projection of these has a bias.

    `t2d` is skipped, `d2t` is read; without `draft_vocab_size` the matrix is the target's.
    """
    width, vocabulary = told["hidden_size"], told["draft_vocab_size"]
    shapes: Shapes = {"fc.weight": (width, width * told["num_aux_hidden_states"])} | _norms(told, "", "norm")
    if vocabulary is not None:
        shapes["lm_head.weight"] = (vocabulary, width)
        if vocabulary < told["vocab_size"]:
            shapes |= {"d2t": (vocabulary,), "t2d": (told["vocab_size"],)}
    for number in range(told["num_hidden_layers"]):
        prefix = "midlayer." if number == 0 else f"layers.{number}."
        shapes |= _attention(told, prefix, reads=width if number else 2 * width) | _mlp(told, prefix)
        shapes |= _norms(told, prefix, *LAYER_NORMS, "hidden_norm")
    return shapes


def _trunk(told: dict[str, Any], *, gated: bool, biases: bool, norms: bool) -> Shapes:
    width = told["hidden_size"]
    shapes: Shapes = {"model.embed_tokens.weight": (told["vocab_size"], width)} | _norms(told, "model.", "norm")
    if not told["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (told["vocab_size"], width)
    for number in range(told["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        shapes |= _layer(told, prefix, gated=gated, biases=biases, norms=norms)
    return shapes


def _layer(told: dict[str, Any], prefix: str, *, gated: bool, biases: bool, norms: bool) -> Shapes:
    shapes = _attention(told, prefix, reads=told["hidden_size"], gated=gated) | _mlp(told, prefix)
    shapes |= _norms(told, prefix, *LAYER_NORMS)
    if norms:
        shapes |= {f"{prefix}self_attn.{one}_norm.weight": (_head_dim(told),) for one in "qk"}
    if biases:
        shapes |= {
            f"{prefix}self_attn.{one}_proj.bias": shapes[f"{prefix}self_attn.{one}_proj.weight"][:1] for one in "qkv"
        }
    return shapes


def mimo(told: dict[str, Any]) -> Shapes:
    """`mimo.py`, a Qwen2 with biases of queries, keys and values; `mimo_mtp.py` takes embedding and matrix from it."""
    prefix, kind = "model.mtp_layers.0.", {"gated": False, "biases": True, "norms": False}
    own = _norms(told, prefix, "token_layernorm", "hidden_layernorm", "final_layernorm")
    own[f"{prefix}input_proj.weight"] = (told["hidden_size"], 2 * told["hidden_size"])
    return _trunk(told, **kind) | _layer(told, prefix, **kind) | own


def qwen3_5(told: dict[str, Any]) -> Shapes:
    """`qwen3_5.py`, whose query projection has a gate's rows beside each head's, and `qwen3_5_mtp.py`."""
    kind = {"gated": told["attn_output_gate"], "biases": False, "norms": True}
    own = _norms(told, "mtp.", "pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
    own["mtp.fc.weight"] = (told["hidden_size"], 2 * told["hidden_size"])
    return _trunk(told, **kind) | _layer(told, "mtp.layers.0.", **kind) | own
