"""Folders of other programs, written by hand: their names are spelled out here once more."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

WIDTH, HEADS, SHARED, INNER, VOCABULARY, LAYERS = 16, 4, 2, 24, 13, 3
HEAD_WIDTH = WIDTH // HEADS
SETTINGS: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": SHARED,
    "intermediate_size": INNER,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}
MODULE_NAMES = {
    "deepseek": ("enorm", "hnorm", "eh_proj", "", "shared_head.norm"),
    "mimo": ("token_layernorm", "hidden_layernorm", "input_proj", "", "final_layernorm"),
    "qwen": ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "layers.0.", "norm"),
}
MODULE_PREFIXES = {"deepseek": f"model.layers.{LAYERS}.", "mimo": "model.mtp_layers.0.", "qwen": "mtp."}


def drawn(*shape: int) -> Tensor:
    """Random values around 1 for norms, around 0 for matrices."""
    return 0.3 * torch.randn(shape) + (1 if len(shape) == 1 else 0)


def block_tensors(prefix: str) -> dict[str, Tensor]:
    """One layer of a Llama."""
    shapes = {
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
        "self_attn.q_proj": (HEADS * HEAD_WIDTH, WIDTH),
        "self_attn.k_proj": (SHARED * HEAD_WIDTH, WIDTH),
        "self_attn.v_proj": (SHARED * HEAD_WIDTH, WIDTH),
        "self_attn.o_proj": (WIDTH, HEADS * HEAD_WIDTH),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }
    return {f"{prefix}{name}.weight": drawn(*shape) for name, shape in shapes.items()}


def llama_tensors(seed: int = 0) -> dict[str, Tensor]:
    """A whole Llama."""
    torch.manual_seed(seed)
    tensors = {"model.embed_tokens.weight": drawn(VOCABULARY, WIDTH), "lm_head.weight": drawn(VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        tensors |= block_tensors(f"model.layers.{layer}.")
    return tensors | {"model.norm.weight": drawn(WIDTH)}


def module_tensors(layout: str, number: int = 0) -> dict[str, Tensor]:
    """A module of one of the layouts."""
    prefix = MODULE_PREFIXES[layout].replace(f".{LAYERS}.", f".{LAYERS + number}.").replace("rs.0.", f"rs.{number}.")
    enorm, hnorm, projection, block, norm = (f"{prefix}{name}" for name in MODULE_NAMES[layout])
    tensors = {f"{name}.weight": drawn(WIDTH) for name in (enorm, hnorm, norm)}
    return tensors | {f"{projection}.weight": drawn(WIDTH, 2 * WIDTH)} | block_tensors(block)


def write_folder(folder: Path, tensors: dict[str, Tensor] | None = None, **settings: Any) -> Path:
    """Write a folder of the Llama family, with settings changed; None removes one."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {name: value for name, value in (SETTINGS | settings).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(told))
    safetensors.torch.save_file(tensors or llama_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_shards(folder: Path, num_shards: int, *, has_index: bool = True) -> Path:
    """Write a folder whose tensors are spread over several files."""
    tensors = llama_tensors()
    write_folder(folder, tensors)
    (folder / "model.safetensors").unlink()
    names = [f"model-{number:05d}-of-{num_shards:05d}.safetensors" for number in range(1, num_shards + 1)]
    weight_map = {name: names[place % num_shards] for place, name in enumerate(tensors)}
    for shard in names:
        part = {name: value for name, value in tensors.items() if weight_map[name] == shard}
        safetensors.torch.save_file(part, folder / shard, metadata={"format": "pt"})
    if has_index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
    return folder
