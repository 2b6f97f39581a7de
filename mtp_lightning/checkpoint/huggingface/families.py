"""Families of pretrained models, one row each: what their settings mean, and where their tensors lie."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_lightning.checkpoint.huggingface.canonical_names import FUSED, LAYER, PLAIN, THEIRS, TensorSource
from mtp_lightning.checkpoint.huggingface.configs import (
    Config,
    check_plain_numbers,
    named,
    possible_settings,
    rotary_fields,
    shared_fields,
    written_rotary,
    written_shared,
)
from mtp_lightning.errors import CheckpointError
from mtp_lightning.model.transformers_architecture import architecture_of
from mtp_lightning.recipe.schema.model import Family, ModelSection

WITHOUT_PREFIX = ("embed_tokens.", "layers.", "norm.", "mtp_layers.", "embed_in.", "final_layer_norm.")
"""Beginnings of tensors' names in a model without its unembedding."""
BUFFERS = re.compile(r"((.+\.)?rotary_emb\.(original_)?inv_freq|.+\.attention\.(masked_)?bias|rope\.freqs)")
"""Names of stored tensors that are computed anew."""


@dataclass(frozen=True)
class FamilyRow:
    """What there is to know of a family.

    A setting that is absent means what the class of transformers makes of it: `defaults`, and of no field that says how
    large a tensor is.
    """

    architecture: str  # class of transformers
    read: Callable[[Config], dict[str, Any]]  # settings to fields of the model section
    write: Callable[[ModelSection], dict[str, Any]]
    source: Callable[[str], TensorSource | None]  # of a place
    defaults: Mapping[str, Any]

    def stored_name(self, name: str) -> str:
        """Complete a name as a model without its unembedding has it (saved by `AutoModel`)."""
        norm = self.source("norm.weight")
        assert norm is not None
        return f"{norm.stored.partition('.')[0]}.{name}" if name.startswith(WITHOUT_PREFIX) else name


def _read_llama(config: Config) -> dict[str, Any]:
    if config.get("hidden_act") != "swish":  # another name of it
        config.check_is("hidden_act", "silu", default="silu")
    rotary = rotary_fields(config)
    Config(config.path, rotary).check_is("partial_rotary_factor", 1.0)
    heads, shared = config.need("num_attention_heads"), config.get("num_key_value_heads")
    if shared and heads % shared:
        raise config.impossible(f"{shared} key and value heads for {heads} query heads")
    has_bias = config.get("attention_bias", default=False)
    return {
        **shared_fields(config),
        **rotary,
        "num_key_value_heads": None if shared == heads else shared,
        "norm_eps": config.number("rms_norm_eps", config.get("rms_norm_eps", default=1e-6)),
        "qkv_bias": has_bias,
        "output_bias": has_bias,
        "mlp_bias": config.get("mlp_bias", default=False),
    }


def _write_llama(section: ModelSection) -> dict[str, Any]:
    return {
        **_write_plain(section),
        "attention_bias": section.qkv_bias,
        "mlp_bias": section.mlp_bias,
    }


def _write_plain(section: ModelSection) -> dict[str, Any]:
    return {
        **written_shared(section),
        **written_rotary(section),
        "hidden_act": "silu",
        "num_key_value_heads": section.resolved_key_value_heads,
        "head_dim": section.resolved_head_dim,
        "rms_norm_eps": section.norm_eps,
    }


def _read_without_bias(config: Config) -> dict[str, Any]:
    return _read_llama(config) | {"qkv_bias": False, "output_bias": False, "mlp_bias": False}


def _write_mistral(section: ModelSection) -> dict[str, Any]:
    return {**_write_plain(section), "sliding_window": None}


def _read_qwen2(config: Config) -> dict[str, Any]:
    return _read_without_bias(config) | {"qkv_bias": True}


def _write_qwen2(section: ModelSection) -> dict[str, Any]:
    told = {**_write_plain(section), "use_sliding_window": False, "sliding_window": None}
    if section.head_dim is None:
        del told["head_dim"]  # no field of this family's own
    return told


def _read_qwen3(config: Config) -> dict[str, Any]:
    return _read_llama(config) | {"qk_norm": True, "mlp_bias": False}


def _write_qwen3(section: ModelSection) -> dict[str, Any]:
    return {**_write_qwen2(section), "head_dim": section.resolved_head_dim, "attention_bias": section.qkv_bias}


def _read_neox(config: Config) -> dict[str, Any]:
    if config.get("hidden_act") != "gelu_python":  # the same, written out
        config.check_is("hidden_act", "gelu", default="gelu")
    has_bias = config.get("attention_bias", default=True)
    return {
        **shared_fields(config),
        **rotary_fields(config, theta="rotary_emb_base", share="rotary_pct"),
        "norm": "layer",
        "norm_eps": config.number("layer_norm_eps", config.get("layer_norm_eps", default=1e-5)),
        "mlp": "gelu",
        "parallel_residual": config.get("use_parallel_residual", default=True),
        "qkv_bias": has_bias,
        "output_bias": has_bias,
        "mlp_bias": True,
    }


def _write_neox(section: ModelSection) -> dict[str, Any]:
    rotary = written_rotary(section)
    return {
        **written_shared(section),
        "hidden_act": "gelu",
        "layer_norm_eps": section.norm_eps,
        "use_parallel_residual": section.parallel_residual,
        "attention_bias": section.qkv_bias,
        "rotary_pct": section.partial_rotary_factor,
        "rotary_emb_base": rotary["rope_theta"],
        "rope_scaling": rotary["rope_scaling"],
    }


def _llama_cell(place: str) -> TensorSource | None:
    if place == "lm_head.weight":
        return TensorSource(place, PLAIN)
    is_base = LAYER.fullmatch(place) or place.startswith(("embed_tokens.", "norm."))
    return TensorSource(f"model.{place}", PLAIN) if is_base else None


NEOX_OUTSIDE = {"embed_tokens": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "lm_head": "embed_out"}
NEOX_INSIDE = {
    "self_attn.q_proj": ("attention.query_key_value", 0),
    "self_attn.k_proj": ("attention.query_key_value", 1),
    "self_attn.v_proj": ("attention.query_key_value", 2),
    "self_attn.o_proj": ("attention.dense", None),
    "mlp.up_proj": ("mlp.dense_h_to_4h", None),
    "mlp.down_proj": ("mlp.dense_4h_to_h", None),
    "input_layernorm": ("input_layernorm", None),
    "post_attention_layernorm": ("post_attention_layernorm", None),
}


def _neox_cell(place: str) -> TensorSource | None:
    owner, _, kind = place.rpartition(".")
    if owner in NEOX_OUTSIDE:
        return TensorSource(f"{NEOX_OUTSIDE[owner]}.{kind}", PLAIN)
    layer = LAYER.fullmatch(place)
    inner = layer[2].removesuffix(f".{kind}") if layer else ""
    if layer is None or inner not in NEOX_INSIDE:
        return None
    name, part = NEOX_INSIDE[inner]
    stored = f"gpt_neox.layers.{layer[1]}.{name}.{kind}"
    return TensorSource(stored, PLAIN) if part is None else TensorSource(stored, FUSED, part)


_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_QWEN = {"max_position_embeddings": 32768, "num_key_value_heads": 32, **_WINDOWS}
_MISTRAL = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
_NEOX = {"max_position_embeddings": 2048, "rotary_pct": 0.25}

FAMILIES: dict[Family, FamilyRow] = {
    "llama": FamilyRow("LlamaForCausalLM", _read_llama, _write_llama, _llama_cell, {"max_position_embeddings": 2048}),
    "mistral": FamilyRow("MistralForCausalLM", _read_without_bias, _write_mistral, _llama_cell, _MISTRAL),
    "qwen2": FamilyRow("Qwen2ForCausalLM", _read_qwen2, _write_qwen2, _llama_cell, _QWEN),
    "qwen3": FamilyRow("Qwen3ForCausalLM", _read_qwen3, _write_qwen3, _llama_cell, {**_QWEN, "head_dim": 128}),
    "mimo": FamilyRow("MiMoForCausalLM", _read_qwen2, _write_qwen2, _llama_cell, _QWEN),
    "gpt_neox": FamilyRow("GPTNeoXForCausalLM", _read_neox, _write_neox, _neox_cell, _NEOX),
}
"""By `model_type`."""


def family_of(config: Config) -> Family | None:
    """Name the family of a folder; None where it is none of those that have a trunk here.

    Raises:
        CheckpointError: Its weights are quantized.
    """
    told, listed = config.get("model_type"), config.get("architectures", default=[])
    names = [named(name) for name in (listed if isinstance(listed, list) else [listed])]
    found = [name for name, row in FAMILIES.items() if name == told or (told is None and row.architecture in names)]
    if not found:
        return None
    check_plain_numbers(config)
    return found[0]


def section_of(config: Config, family: Family) -> ModelSection:
    """Build the model section of a folder.

    Raises:
        CheckpointError: A setting is missing, impossible, or asks for what the model here cannot do.
    """
    with possible_settings(config):
        row = FAMILIES[family]
        return ModelSection.model_validate(row.read(config.with_defaults(row.defaults)) | {"family": family})


def settings_of(section: ModelSection) -> tuple[Family, dict[str, Any]]:
    """Write a model section as settings of its family, or of the first that can say it.

    Raises:
        CheckpointError: No family can.
    """
    if section.hf_config is not None:
        return "transformers", dict(section.hf_config)
    lost: dict[str, list[str]] = {}
    for family in [section.family] if section.family else FAMILIES:
        settings = FAMILIES[family].write(section)
        told = section_of(Config(Path("config.json"), settings), family)
        lost[family] = [
            f"{name} = {getattr(section, name)}"
            for name in ModelSection.model_fields
            if name != "family" and _meaning(section, name) != _meaning(told, name)
        ]
        if not lost[family]:
            return family, settings
    nearest = min(lost, key=lambda family: len(lost[family]))
    raise CheckpointError(
        f"a model to be exported must be one that a family of transformers can be: {', '.join(lost)}",
        f"{', '.join(lost[nearest])}, which {nearest} cannot have",
        "Set model.family=null for the first that fits, or export with --format consolidated",
    )


def base_source(place: str, family: Family) -> TensorSource | None:
    """Find where a place of the base model lies in the files of a family."""
    if family == "transformers":
        return TensorSource(place.removeprefix(THEIRS), PLAIN) if place.startswith(THEIRS) else None
    return FAMILIES[family].source(place)


def architecture_name(section: ModelSection, family: Family) -> str:
    """Name the class of transformers that a model is."""
    return architecture_of(section).name if section.is_foreign else FAMILIES[family].architecture


def _meaning(section: ModelSection, name: str) -> Any:
    """Value of a field, computed ones resolved."""
    return getattr(section, f"resolved_{name.removeprefix('num_')}", getattr(section, name))
