"""Settings of a GGUF file as a config.json of transformers would say them.

To add an architecture: a row in `ARCHITECTURES`, and a case in `tests/checkpoint/gguf_models.py`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtp_lightning.checkpoint.format.tensors import Entry
from mtp_lightning.checkpoint.huggingface.canonical_names import (
    LAYER,
    PAIRED,
    PLAIN,
    STACKED,
    TensorLayout,
    TensorSource,
)
from mtp_lightning.checkpoint.huggingface.configs import Config, named
from mtp_lightning.checkpoint.huggingface.families import FAMILIES
from mtp_lightning.checkpoint.huggingface.gguf_file import GGUFHeader
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.untrusted import described
from mtp_lightning.recipe.schema.model import Family


class Architecture(NamedTuple):
    """What there is to know of an architecture of llama.cpp."""

    family: Family
    norm_eps: str  # its key, after the architecture's name
    turned: TensorLayout  # how queries and keys are stored


ARCHITECTURES = {
    "llama": Architecture("llama", "attention.layer_norm_rms_epsilon", PAIRED),
    "qwen2": Architecture("qwen2", "attention.layer_norm_rms_epsilon", PLAIN),
    "qwen3": Architecture("qwen3", "attention.layer_norm_rms_epsilon", PLAIN),
    "gptneox": Architecture("gpt_neox", "attention.layer_norm_epsilon", PLAIN),
}
"""By `general.architecture`; Mistral's models are called llama there."""

EMBEDDING, MATRIX, FREQUENCIES = "token_embd.weight", "output.weight", "rope_freqs.weight"
OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
INSIDE = {
    **{f"self_attn.{one}_proj": f"attn_{one}" for one in "qkv"},
    **{f"self_attn.{one}_norm": f"attn_{one}_norm" for one in "qk"},
    **{f"mlp.{one}_proj": f"ffn_{one}" for one in ("gate", "up", "down")},
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
PARTS = {"attn_q": 0, "attn_k": 1, "attn_v": 2}
CHANGING = (
    *("logit_scale", "residual_scale", "embedding_scale", "attention.scale", "attention.clamp_kqv"),
    *("attn_logit_softcapping", "final_logit_softcapping", "attention.max_alibi_bias", "nextn_predict_layers"),
)
"""Keys of settings that the trunks here do not have."""
TAKE_FOLDER = "Take the model's folder of transformers instead, with config.json and *.safetensors"
OTHER_KINDS = {
    "mmproj": "a projector of images or sound, which belongs to a model: give the model's own file beside it",
    "adapter": "a LoRA adapter: merge it into its model where it was made (llama-export-lora), and import that",
    "imatrix": "statistics for quantisation: give the model that they were made of",
    "vocab": "a vocabulary without weights: give the model's file",
}
"""Values of `general.type` that are no models."""


def source_of(place: str, architecture: Architecture) -> TensorSource | None:
    """Find a place of the base model in a GGUF file."""
    owner, _, kind = place.rpartition(".")
    if owner in OUTSIDE:
        return TensorSource(f"{OUTSIDE[owner]}.{kind}", PLAIN)
    layer = LAYER.fullmatch(place)
    name = INSIDE.get(layer[2].removesuffix(f".{kind}")) if layer else None
    if layer is None or name is None:
        return None
    if architecture.family == "gpt_neox" and name in PARTS:
        return TensorSource(f"blk.{layer[1]}.attn_qkv.{kind}", STACKED, PARTS[name])
    return TensorSource(f"blk.{layer[1]}.{name}.{kind}", architecture.turned if name in ("attn_q", "attn_k") else PLAIN)


def architecture_of(header: GGUFHeader) -> Architecture:
    """Look up what a file is.

    Raises:
        CheckpointError: it holds no model, or one of an architecture that is not known here.
    """
    told, kind = header.values.get("general.architecture"), header.values.get("general.type", "model")
    kind = "mmproj" if told == "clip" else "vocab" if not header.tensors else kind
    if isinstance(kind, str) and kind in OTHER_KINDS:
        what, _, hint = OTHER_KINDS[kind].partition(": ")
        raise CheckpointError("a *.gguf file to import must hold a model", f"{what}, in {header.path}", _sentence(hint))
    if not isinstance(told, str) or told not in ARCHITECTURES:
        found = "nothing" if told is None else f"general.architecture {described(told)}"
        expected = f"the architecture of a *.gguf file must be one of {', '.join(ARCHITECTURES)}"
        raise CheckpointError(expected, f"{found}, in {header.path}", TAKE_FOLDER)
    return ARCHITECTURES[told]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


class _Values:
    """The values of a file under the keys of its architecture."""

    def __init__(self, header: GGUFHeader) -> None:
        self.architecture, self._header = str(header.values["general.architecture"]), header

    def get(self, name: str, default: Any = None) -> Any:
        """Return a value; of a list with an entry for each layer, the one that all have."""
        key = f"{self.architecture}.{name}"
        value = self._header.values.get(key, default)
        if isinstance(value, np.ndarray):
            if not value.size or (value != value[0]).any():
                raise self.refused("every layer must have the same shape", f"{key} with {len(set(value.tolist()))}")
            value = value[0].item()
        return value

    def need(self, name: str) -> Any:
        """Return a value that every model has."""
        if (value := self.get(name)) is None:
            raise self.refused(f"a *.gguf file must say {self.architecture}.{name}", "nothing")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """Return a number."""
        value = self.need(name) if default is None else self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.refused(f"{self.architecture}.{name} must be a number", described(value))
        return value

    def refused(self, expected: str, found: str, hint: str = TAKE_FOLDER) -> CheckpointError:
        """Build the error about a value."""
        return CheckpointError(expected, f"{found}, in {self._header.path}", hint)


def settings_of_gguf(
    header: GGUFHeader, entries: Mapping[str, Entry], frequencies: NDArray[np.float32] | None
) -> dict[str, Any]:
    """Say what a config.json of the model would say.

    Args:
        header: the model's, or that of its first file.
        entries: its tensors.
        frequencies: values of `rope_freqs.weight`, by which rotary frequencies are divided, if there are any.

    Raises:
        CheckpointError: a setting is missing, or asks for what the model here cannot do.
    """
    architecture, values = architecture_of(header), _Values(header)
    _check_plain(values)
    heads, width = values.need("attention.head_count"), values.need("embedding_length")
    stored = entries.get(EMBEDDING)
    settings = {
        "architectures": [FAMILIES[architecture.family].architecture],
        "model_type": architecture.family,
        "hidden_size": width,
        "num_hidden_layers": values.need("block_count"),
        "num_attention_heads": heads,
        "intermediate_size": values.need("feed_forward_length"),
        "vocab_size": values.get("vocab_size", stored.shape[0] if stored else None),
        "max_position_embeddings": values.need("context_length"),
        "tie_word_embeddings": MATRIX not in entries,
        **_special_ids(header),
    }
    Config(header.path, settings).need("vocab_size")
    if type(heads) is not int or type(width) is not int or not 0 < heads <= width:
        raise values.refused("the settings must be possible ones", f"{described(heads)} heads for {described(width)}")
    own = _neox(values, entries) if architecture.family == "gpt_neox" else _llama(values, entries, architecture)
    turned = int(own.pop("turned"))
    own["rope_scaling"] = _scaling(values, frequencies, turned)
    return settings | own


def _check_plain(values: _Values) -> None:
    """Refuse what the trunks here cannot compute."""
    if experts := values.number("expert_count", 0):
        raise values.refused("a model in a *.gguf file must be without experts", f"{experts} of them")
    if values.get("attention.causal", True) is False:
        raise values.refused("the model must be a decoder", f"{values.architecture}.attention.causal false")
    if told := [name for name in CHANGING if values.get(name)]:
        found = f"{values.architecture}.{told[0]} {described(values.get(told[0]))}"
        raise values.refused("the model must be a plain one of its architecture", found)
    window, positions = values.number("attention.sliding_window", 0), values.number("context_length")
    if 0 < window < positions:
        key = f"{values.architecture}.context_length"
        raise values.refused(
            "every layer must attend to all positions",
            f"a sliding window of {window} for {positions} positions",
            "If no longer text than the window is to be read, set the positions to it in a copy of the file "
            f"(gguf-set-metadata FILE {key} {window}); else choose a model without one",
        )


def _llama(values: _Values, entries: Mapping[str, Entry], architecture: Architecture) -> dict[str, Any]:
    heads, width = values.need("attention.head_count"), values.need("embedding_length")
    told = values.get("rope.dimension_count") if architecture.family == "llama" else None
    head_dim = values.get("attention.key_length") or told or width // heads
    if values.get("attention.value_length", head_dim) != head_dim or values.get("rope.dimension_count") not in (
        None,
        head_dim,
    ):
        raise values.refused("keys, values and rotary positions of a head must be of one size", "several sizes")
    settings = {
        "hidden_act": "silu",
        "num_key_value_heads": values.get("attention.head_count_kv", heads),
        "rms_norm_eps": values.number(architecture.norm_eps),
        "rope_theta": values.number("rope.freq_base", 10000.0),
        "turned": head_dim,
    }
    if architecture.family != "qwen2" or head_dim * heads != width:
        settings["head_dim"] = head_dim
    if architecture.family != "llama":
        settings |= {"use_sliding_window": False, "sliding_window": None}
    if architecture.family != "qwen2":
        settings["attention_bias"] = "blk.0.attn_q.bias" in entries
    if architecture.family == "llama":
        settings["mlp_bias"] = "blk.0.ffn_up.bias" in entries
    return settings


def _neox(values: _Values, entries: Mapping[str, Entry]) -> dict[str, Any]:
    head_dim = values.need("embedding_length") // values.need("attention.head_count")
    turned = values.number("rope.dimension_count", head_dim)
    return {
        "hidden_act": "gelu",
        "layer_norm_eps": values.number(ARCHITECTURES["gptneox"].norm_eps),
        "use_parallel_residual": values.get("use_parallel_residual", True),
        "attention_bias": "blk.0.attn_qkv.bias" in entries,
        "rotary_pct": turned / head_dim,
        "rotary_emb_base": values.number("rope.freq_base", 10000.0),
        "turned": turned,
    }


def _special_ids(header: GGUFHeader) -> dict[str, Any]:
    """Say which ids begin, end and fill a text; of several that end one, all."""
    told = {name: header.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot", "eom")}
    told["pad"], told["unk"] = (header.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("padding", "unknown"))
    ends = [*dict.fromkeys(told[name] for name in ("eos", "eot", "eom") if told[name] is not None)]
    ids = {"eos_token_id": ends if len(ends) > 1 else ends[0] if ends else None}
    return ids | {f"{name}_token_id": told[name] for name in ("bos", "pad", "unk") if told[name] is not None}


def _scaling(values: _Values, frequencies: NDArray[np.float32] | None, turned: int) -> dict[str, Any] | None:
    """Say how rotary positions are scaled."""
    kind = values.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        return {"rope_type": named(kind)}  # refused where settings are read
    factor = values.number("rope.scaling.factor", 0) if kind == "linear" else values.number("rope.scale_linear", 0)
    is_linear = factor not in (0, 1)
    if frequencies is None or (frequencies == 1).all():
        return {"rope_type": "linear", "factor": float(factor)} if is_linear else None
    told = _llama3(values, frequencies, turned) if not is_linear else None
    if told is None:
        raise values.refused("rope_freqs.weight must hold the factors of llama3 scaling", f"{frequencies.size} others")
    return told


def _llama3(values: _Values, frequencies: NDArray[np.float32], turned: int) -> dict[str, Any] | None:
    """Find the settings of llama3 scaling by the factors that llama.cpp computes from them, which alone are stored.

    Released models have 1 and 4 for the bounds; only their ratio to the window matters, so that these stand for all
    with this ratio.
    """
    if not 0 < turned == 2 * frequencies.size:
        return None
    plain = values.number("rope.freq_base", 10000.0) ** (-np.arange(0, turned, 2) / turned)
    told = values.number("rope.scaling.original_context_length", 8192)
    factors = dict.fromkeys((float(frequencies.max()), 8.0, 32.0, 4.0, 16.0, 2.0))
    windows = dict.fromkeys((int(told), *(2**power for power in range(4, 21))))
    for factor, window in ((factor, window) for factor in factors for window in windows):
        kept = ((window * plain / (2 * math.pi) - 1) / 3).clip(0, 1)
        if np.allclose(1 / (kept + (1 - kept) / factor), frequencies, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": window,
            }
    return None
