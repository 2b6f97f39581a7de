"""Meta's own layout: Llama weights before their conversion, with `extra_heads` in `facebook/multi-token-prediction`.

`params.json` counts the layers of all heads; `layers` holds the trunk's and, last, the main head's [model card].
"""

import re
from typing import Any

from mtp_lightning.checkpoint.format.tensors import Entry
from mtp_lightning.checkpoint.huggingface.canonical_names import LAYER, PAIRED, PLAIN, TensorSource
from mtp_lightning.checkpoint.huggingface.configs import Config, possible_settings
from mtp_lightning.checkpoint.huggingface.modules import Native, extra_place
from mtp_lightning.files.untrusted import described
from mtp_lightning.recipe.schema.model import ModelSection

SETTINGS = "params.json"
MOST_HEADS = 1024
POSITIONS = 4096  # of Llama 2; params.json does not say
OUTSIDE = {
    "embed_tokens.weight": "tok_embeddings.weight",
    "norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
INSIDE = {
    "self_attn.q_proj.weight": ("attention.wq.weight", PAIRED),
    "self_attn.k_proj.weight": ("attention.wk.weight", PAIRED),
    "self_attn.v_proj.weight": ("attention.wv.weight", PLAIN),
    "self_attn.o_proj.weight": ("attention.wo.weight", PLAIN),
    "mlp.gate_proj.weight": ("feed_forward.w1.weight", PLAIN),
    "mlp.down_proj.weight": ("feed_forward.w2.weight", PLAIN),
    "mlp.up_proj.weight": ("feed_forward.w3.weight", PLAIN),
    "input_layernorm.weight": ("attention_norm.weight", PLAIN),
    "post_attention_layernorm.weight": ("ffn_norm.weight", PLAIN),
}


def meta_section(config: Config, entries: dict[str, Entry]) -> ModelSection:
    """Build the model section from params.json and, for what it leaves open, the shapes of tensors."""
    with possible_settings(config):
        _check_plain(config)
        heads, width = config.need("n_heads"), config.need("dim")
        shared = config.get("n_kv_heads", heads)
        values: dict[str, Any] = {
            "hidden_size": width,
            "num_hidden_layers": config.need("n_layers") - num_extra_heads(config),
            "num_attention_heads": heads,
            "num_key_value_heads": None if shared == heads else shared,
            "head_dim": config.get("head_dim"),
            "intermediate_size": _rows(config, entries, "layers.0.feed_forward.w1.weight"),
            "vocab_size": _rows(config, entries, "tok_embeddings.weight"),
            "max_position_embeddings": config.get("max_seq_len", POSITIONS),
            "norm_eps": config.number("norm_eps", config.get("norm_eps", 1e-5)),
            "rope_theta": config.number("rope_theta", config.get("rope_theta", 10000.0)),
            "family": "llama",
        }
        return ModelSection.model_validate(values)


def _check_plain(config: Config) -> None:
    """Refuse what later models of Meta and Mistral add in this layout."""
    window, positions = config.get("sliding_window"), config.get("max_seq_len", POSITIONS)
    told = [name for name in ("use_scaled_rope", "yarn", "moe", "quantization") if config.get(name)]
    told += ["sliding_window"] if window is not None and window < positions else []
    if told:
        hint = "Take the release in the format of transformers"
        raise config.refused(
            f"a model in this layout must be plain, without {told[0]}", described(config.get(told[0])), hint
        )


def num_extra_heads(config: Config) -> int:
    """Count the heads beside the main one."""
    return (config.whole("n_future_tokens", 1, least=1, most=MOST_HEADS) or 1) - 1


def meta_source(place: str) -> TensorSource | None:
    """Find a place of the base model."""
    if place in OUTSIDE:
        return TensorSource(OUTSIDE[place], PLAIN)
    layer = LAYER.fullmatch(place)
    return _inside(f"layers.{layer[1]}", layer[2]) if layer else None


def native_heads(config: Config) -> Native | None:
    """Describe the extra heads, if there are any."""
    count = num_extra_heads(config)
    return Native("Meta", count, {"kind": "parallel"}, _extra_source, {}) if count else None


def _extra_source(place: str) -> TensorSource | None:
    extra = extra_place(place)
    return _inside(f"extra_heads.{extra[0]}", extra[1]) if extra else None


def _inside(layer: str, inner: str) -> TensorSource | None:
    if inner not in INSIDE:
        return None
    name, layout = INSIDE[inner]
    return TensorSource(f"{layer}.{name}", layout)


def _rows(config: Config, entries: dict[str, Entry], name: str) -> int:
    if name not in entries or not entries[name].shape:
        beginnings = ", ".join(sorted({re.sub(r"\d+", "N", other) for other in entries})[:6])
        raise config.refused(f"the weights beside {SETTINGS} must have {name}", beginnings, "Download the folder again")
    return entries[name].shape[0]
