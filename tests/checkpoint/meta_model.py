"""Meta's multi-token model written out: rotary positions by complex numbers, heads behind the trunk, one output."""

import json
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.checkpoint.foreign import HEAD_WIDTH, HEADS, INNER, SHARED, VOCABULARY, WIDTH, drawn

BASE_LAYERS, EXTRA_HEADS = 3, 2
SETTINGS = {
    "dim": WIDTH,
    "n_layers": BASE_LAYERS + EXTRA_HEADS,
    "n_heads": HEADS,
    "n_kv_heads": SHARED,
    "vocab_size": -1,
    "norm_eps": 1e-5,
    "n_future_tokens": 1 + EXTRA_HEADS,
}


def write_meta(folder: Path) -> dict[str, Tensor]:
    """Write a random model, and return its tensors."""
    torch.manual_seed(0)
    tensors = {name: drawn(VOCABULARY, WIDTH) for name in ("tok_embeddings.weight", "output.weight")}
    tensors |= {"norm.weight": drawn(WIDTH), "rope.freqs": torch.ones(HEAD_WIDTH // 2)}
    prefixes = [f"layers.{layer}" for layer in range(BASE_LAYERS)] + [f"extra_heads.{j}" for j in range(EXTRA_HEADS)]
    for prefix in prefixes:
        tensors |= {f"{prefix}.{name}.weight": drawn(*shape) for name, shape in SHAPES.items()}
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(SETTINGS))
    safetensors.torch.save_file(tensors, folder / "consolidated.safetensors")
    return tensors


SHAPES = {
    "attention.wq": (HEADS * HEAD_WIDTH, WIDTH),
    "attention.wk": (SHARED * HEAD_WIDTH, WIDTH),
    "attention.wv": (SHARED * HEAD_WIDTH, WIDTH),
    "attention.wo": (WIDTH, HEADS * HEAD_WIDTH),
    "feed_forward.w1": (INNER, WIDTH),
    "feed_forward.w2": (WIDTH, INNER),
    "feed_forward.w3": (INNER, WIDTH),
    "attention_norm": (WIDTH,),
    "ffn_norm": (WIDTH,),
}


def meta_logits(tensors: dict[str, Tensor], tokens: Tensor) -> list[Tensor]:
    """Scores of all heads, the next token's first: (B, T) -> n of (B, T, V)."""
    hidden = tensors["tok_embeddings.weight"][tokens]
    for layer in range(BASE_LAYERS - 1):
        hidden = _layer(tensors, f"layers.{layer}", hidden)
    heads = [f"layers.{BASE_LAYERS - 1}", *(f"extra_heads.{j}" for j in range(EXTRA_HEADS))]
    ends = [_norm(_layer(tensors, head, hidden), tensors["norm.weight"]) for head in heads]
    return [end @ tensors["output.weight"].T for end in ends]


def _norm(hidden: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(hidden, (WIDTH,), weight, 1e-5)


def _turn(states: Tensor) -> Tensor:
    """Turn neighbouring channels, as one complex number each: (B, T, H, W) -> (B, T, H, W)."""
    frequencies = 10000.0 ** (-torch.arange(0, HEAD_WIDTH, 2).double() / HEAD_WIDTH)
    angles = torch.arange(states.shape[1]).double()[:, None] * frequencies
    pairs = torch.view_as_complex(states.double().unflatten(-1, (-1, 2)))
    turned = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).flatten(-2).to(states.dtype)


def _layer(tensors: dict[str, Tensor], prefix: str, hidden: Tensor) -> Tensor:
    weights = {name: tensors[f"{prefix}.{name}.weight"] for name in SHAPES}
    normed = _norm(hidden, weights["attention_norm"])
    query, key, value = (
        (normed @ weights[f"attention.{name}"].T).unflatten(-1, (-1, HEAD_WIDTH)) for name in ("wq", "wk", "wv")
    )
    query, key = _turn(query), _turn(key)
    key, value = (part.repeat_interleave(HEADS // SHARED, 2) for part in (key, value))
    mixed = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)), is_causal=True)
    hidden = hidden + mixed.transpose(1, 2).flatten(2) @ weights["attention.wo"].T
    normed = _norm(hidden, weights["ffn_norm"])
    inner = F.silu(normed @ weights["feed_forward.w1"].T) * (normed @ weights["feed_forward.w3"].T)
    return hidden + inner @ weights["feed_forward.w2"].T
