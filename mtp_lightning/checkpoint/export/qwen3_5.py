"""Qwen3.5's layout, which vLLM, SGLang and llama.cpp's converter read, for trunks with norms of queries and keys.

Qwen3.5 computes the same as Qwen3 where every norm's weight is stored less one, where the gate of attention is
sigmoid(0) = 1/2 because its rows of the query projection are zero, and where the output projection is doubled.
A module that was trained on the state before the final norm reads that state here too: with w the norm's weight, the
unembedding's columns are multiplied by w, the final norm becomes one, and the module's own final norm is divided by w.

llama.cpp fails on a model of this architecture without a recurrent layer, so the folder for it has one that adds zeros.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.checkpoint.export.contents import Contents, Refusal, Source
from mtp_lightning.checkpoint.export.rewritten import (
    Made,
    RewrittenWeights,
    computed,
    filled,
    first_module,
    left_out,
    not_dense,
    not_modules,
    notes_on,
    read_whole,
    refusal,
    row_by_row,
    settings_as,
)
from mtp_lightning.checkpoint.export.trunk import modules_contents, trunk_contents
from mtp_lightning.checkpoint.format.reader_view import WeightSource
from mtp_lightning.checkpoint.huggingface.modules import QWEN
from mtp_lightning.checkpoint.huggingface.weights import OutgoingWeights
from mtp_lightning.errors import CheckpointError
from mtp_lightning.model.transformers_architecture import architecture_of
from mtp_lightning.recipe import Recipe
from mtp_lightning.recipe.schema.model import ModelSection

NORM, MODULE_NORM = "model.norm.weight", "mtp.norm.weight"
EMBEDDING, MATRIX = "model.embed_tokens.weight", "lm_head.weight"
LINEAR_LAYERS = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 1,
}
"""Sizes of layers that the model does not have, but its readers ask for."""


def refuses_qwen3_5(recipe: Recipe) -> Refusal | None:
    """Refuse what is not one module on a trunk that Qwen3 can be, or one that comes in this layout."""
    heads, model = recipe.heads, recipe.model
    if model.is_foreign and is_published_so(model):
        expected = "modules as the releases of this type have them: one, of one layer, on the state behind the norm"
        is_one = heads.num_offsets == 2 or heads.kind == "recursive"
        wrong = not_modules(heads) | {"the state before the norm": heads.hidden == "pre_norm"}
        return refusal(expected, wrong | {f"{heads.num_offsets} offsets": not is_one or heads.num_offsets == 1})
    is_unrolled = heads.kind == "recursive" and heads.num_offsets > 2
    return refusal(
        "sequential or recursive modules of one layer that share the main matrix, on a trunk of Qwen3's kind, with "
        "norms of queries and keys",
        not_modules(heads)
        | {"a module on the state before the norm, unrolled": is_unrolled and heads.hidden == "pre_norm"}
        | not_dense(recipe)
        | {
            "no norms of queries and keys (model.qk_norm)": not model.qk_norm,
            "biases in attention": model.qkv_bias or model.output_bias,
        },
    )


def refuses_gguf(recipe: Recipe) -> Refusal | None:
    """Refuse the same, and trunks that are published in this layout."""
    if recipe.model.is_foreign:
        return Refusal("the trunk must be one of Qwen3's kind", "a trunk of transformers' own classes")
    return refuses_qwen3_5(recipe)


def is_published_so(section: ModelSection) -> bool:
    """Tell whether a class of transformers expects modules in this layout beside its own weights."""
    patterns = architecture_of(section).model._keys_to_ignore_on_load_unexpected or ()
    return any(re.search(pattern, "mtp.fc.weight") for pattern in patterns)


def qwen3_5_contents(source: Source, *, for_llama_cpp: bool = False) -> dict[str, Contents]:
    """Trunk and first module; `for_llama_cpp` adds what that needs beside.

    Raises:
        CheckpointError: A weight of the final norm is zero, and the module reads the state before it.
    """
    if source.section.is_foreign:
        return {"": modules_contents(source, QWEN)}
    trunk, sources = trunk_contents(source), first_module(source, QWEN)
    weights = OutgoingWeights(source.reader, sources, source.section)
    rewritten = {name: made for name in weights.names if (made := _rewritten(weights, name))}
    settings = settings_as(source, trunk, "qwen3", qk_norm=True)
    is_folded = source.recipe.heads.hidden == "pre_norm"
    if is_folded:
        rewritten |= _folded(weights, MATRIX if MATRIX in weights.names else EMBEDDING)
        settings["tie_word_embeddings"] = False
    if for_llama_cpp:
        rewritten |= _idle_layer(source)
    new = {name: "what the layout has and the model has not" for name in rewritten if name not in weights.names}
    return {
        "": Contents(
            weights=RewrittenWeights(weights, rewritten),
            settings=_settings(source, settings, for_llama_cpp=for_llama_cpp),
            written={name: one.stored for name, one in sources.items()},
            made=new,
            left_out=left_out(source, sources, QWEN.name),
            files=trunk.files,
            notes=notes_on(source.recipe),
        )
    }


def _rewritten(weights: WeightSource, name: str) -> Made | None:
    shape = weights.shape(name)
    if len(shape) == 1:
        return computed(shape, lambda: read_whole(weights, name) - 1)
    if name.endswith("q_proj.weight"):
        width = weights.shape(name.replace("q_proj", "q_norm"))[0]
        return computed((2 * shape[0], shape[1]), lambda: _gated(read_whole(weights, name), width))
    if name.endswith("o_proj.weight"):
        return computed(shape, lambda: 2 * read_whole(weights, name))
    return None


def _gated(queries: Tensor, head_dim: int) -> Tensor:
    """Put as many rows of zero behind the rows of each head: (H d, D) -> (2 H d, D)."""
    by_head = queries.view(-1, head_dim, queries.shape[1])
    return torch.cat((by_head, torch.zeros_like(by_head)), dim=1).flatten(0, 1)


def _folded(weights: WeightSource, matrix: str) -> dict[str, Made]:
    """Move the final norm's weight into the unembedding, and out of the module's norm."""
    norm = read_whole(weights, NORM)
    if not bool(norm.all()):
        raise CheckpointError(
            "a module on the state before the final norm can be exported to qwen3_5 where no weight of that norm is 0",
            f"{int((norm == 0).sum())} of {norm.numel()} are",
            "Train with heads.hidden=post_norm, or export with --format consolidated",
        )
    return {
        NORM: computed(tuple(norm.shape), lambda: torch.zeros_like(norm)),
        MODULE_NORM: computed(tuple(norm.shape), lambda: read_whole(weights, MODULE_NORM) / norm - 1),
        MATRIX: row_by_row(weights, matrix, lambda rows: rows * norm),
    }


def _idle_layer(source: Source) -> dict[str, Made]:
    """Make a recurrent layer behind the last one that adds nothing to the state."""
    width, inside = source.section.hidden_size, source.section.resolved_intermediate_size
    number, small = source.section.num_hidden_layers, LINEAR_LAYERS["linear_key_head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "linear_attn.in_proj_qkv.weight": (3 * small, width),
        "linear_attn.in_proj_z.weight": (small, width),
        "linear_attn.in_proj_a.weight": (1, width),
        "linear_attn.in_proj_b.weight": (1, width),
        "linear_attn.conv1d.weight": (3 * small, 1, LINEAR_LAYERS["linear_conv_kernel_dim"]),
        "linear_attn.dt_bias": (1,),
        "linear_attn.A_log": (1,),
        "linear_attn.norm.weight": (small,),
        "linear_attn.out_proj.weight": (width, small),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "mlp.gate_proj.weight": (inside, width),
        "mlp.up_proj.weight": (inside, width),
        "mlp.down_proj.weight": (width, inside),
    }
    return {f"model.layers.{number}.{name}": filled(0.0, *shape) for name, shape in shapes.items()}


def _settings(source: Source, settings: Mapping[str, Any], *, for_llama_cpp: bool) -> dict[str, Any]:
    theta, scaling = settings["rope_theta"], settings["rope_scaling"] or {"rope_type": "default"}
    positions: dict[str, Any] = {**scaling, "rope_theta": theta, "partial_rotary_factor": 1.0}
    if for_llama_cpp:
        half = source.section.resolved_head_dim // 2
        positions |= {"mrope_section": [-(-half // 3), (half + 1) // 3, half // 3], "mrope_interleaved": True}
    num_layers, types = source.section.num_hidden_layers, ["full_attention"] * source.section.num_hidden_layers
    if for_llama_cpp:
        num_layers, types = num_layers + 1, [*types, "linear_attention"]
    unsaid = ("rope_theta", "rope_scaling", "attention_bias", "use_sliding_window", "sliding_window")
    return {name: value for name, value in settings.items() if name not in unsaid} | {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "rope_parameters": positions,
        "partial_rotary_factor": 1.0,
        "num_hidden_layers": num_layers,
        "layer_types": types,
        "full_attention_interval": 1,
        "attn_output_gate": True,
        "mtp_num_hidden_layers": 1,
        **LINEAR_LAYERS,
    }
