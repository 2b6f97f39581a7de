"""What engines compute with the layouts that are exported for them, in plain torch and transformers' own layers."""

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional


class Served:
    """A folder as an engine sees it: the trunk in transformers' class, and the tensors beside it."""

    def __init__(self, transformers: Any, folder: Path) -> None:
        self.transformers = transformers
        self.trunk = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tensors = tensors_of(folder)
        self.config = self.trunk.config

    @torch.no_grad()
    def states(self, tokens: Tensor) -> tuple[list[Tensor], Tensor]:
        """Run the trunk on (1, T) tokens: the states before every layer and after the last, and the normed state."""
        kept: list[Tensor] = []
        hooks = [
            module.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
            for module in (*self.trunk.model.layers, self.trunk.model.norm)
        ]
        normed = self.trunk.model(tokens).last_hidden_state
        for hook in hooks:
            hook.remove()
        return kept, normed

    def layer(self, prefix: str, name: str) -> Any:
        """Load one layer of transformers' class of the trunk from tensors under a prefix."""
        layer = type(self.trunk.model.layers[0])(self.config, 0)
        state = {
            one.removeprefix(prefix): value
            for one, value in self.tensors.items()
            if one.removeprefix(prefix) in layer.state_dict()
        }
        assert state.keys() == layer.state_dict().keys(), name
        layer.load_state_dict(state)
        return layer.eval()

    def run(self, layer: Any, hidden: Tensor) -> Tensor:
        """Run a layer causally: (1, T, D) -> (1, T, D)."""
        length = hidden.shape[1]
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        angles = self.trunk.model.rotary_emb(hidden, positions)
        made = layer(hidden, position_embeddings=angles, attention_mask=mask, position_ids=positions)
        return made[0] if isinstance(made, tuple) else made


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder."""
    return safetensors.torch.load_file(folder / "model.safetensors")


def rms(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm."""
    return weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)


@torch.no_grad()
def mimo_scores(served: Served, tokens: Tensor) -> Tensor:
    """MiMo's module as vLLM runs it, on the state before the final norm: (1, T) -> (1, T-1, V)."""
    states, _ = served.states(tokens)
    prefix, eps = "model.mtp_layers.0.", served.config.rms_norm_eps
    hidden = rms(states[-1][:, :-1], served.tensors[f"{prefix}hidden_layernorm.weight"], eps)
    token = rms(served.trunk.model.embed_tokens(tokens[:, 1:]), served.tensors[f"{prefix}token_layernorm.weight"], eps)
    joined = functional.linear(torch.cat((hidden, token), -1), served.tensors[f"{prefix}input_proj.weight"])
    made = served.run(served.layer(prefix, "mimo"), joined)
    return served.trunk.lm_head(rms(made, served.tensors[f"{prefix}final_layernorm.weight"], eps))


@torch.no_grad()
def qwen3_5_scores(served: Served, tokens: Tensor) -> Tensor:
    """Qwen3.5's module, on the normed state: (1, T) -> (1, T-1, V)."""
    _, normed = served.states(tokens)
    eps = served.config.rms_norm_eps
    hidden = rms(normed[:, :-1], 1 + served.tensors["mtp.pre_fc_norm_hidden.weight"], eps)
    token = served.trunk.model.embed_tokens(tokens[:, 1:])
    token = rms(token, 1 + served.tensors["mtp.pre_fc_norm_embedding.weight"], eps)
    joined = functional.linear(torch.cat((token, hidden), -1), served.tensors["mtp.fc.weight"])
    made = served.run(served.layer("mtp.layers.0.", "qwen3_5"), joined)
    return served.trunk.lm_head(rms(made, 1 + served.tensors["mtp.norm.weight"], eps))


@torch.no_grad()
def medusa_scores(served: Served, drafter: Path, settings: dict[str, Any], tokens: Tensor) -> list[Tensor]:
    """Medusa's heads: (1, T) -> one (1, T, V) each."""
    _, normed = served.states(tokens)
    tensors, scores = tensors_of(drafter), []
    for head in range(settings["medusa_num_heads"]):
        hidden, num_blocks = normed, settings["medusa_num_layers"]
        for block in range(num_blocks):
            name = f"{head}.{block}.linear"
            hidden = hidden + functional.silu(
                functional.linear(hidden, tensors[f"{name}.weight"], tensors[f"{name}.bias"])
            )
        own = 0 if settings["original_lm_head"] else head
        told = functional.linear(hidden, tensors[f"{own}.{num_blocks}.weight"])
        assert told.shape[-1] == settings["truncated_vocab_size"] == settings["vocab_size"]
        scores.append(told)
    return scores


def _scattered(scores: Tensor, ids: Tensor, vocab_size: int) -> Tensor:
    """Scores of some ids as those of all, the others minus infinity."""
    assert ids.dtype == torch.int64
    whole = torch.full((*scores.shape[:-1], vocab_size), -torch.inf)
    whole[..., ids] = scores
    return whole


@torch.no_grad()
def eagle_scores(served: Served, drafter: Path, settings: dict[str, Any], tokens: Tensor) -> Tensor:
    """EAGLE-3's drafter as vLLM runs it: (1, T) -> (1, T-1, V)."""
    states, _ = served.states(tokens)
    tensors, eps = tensors_of(drafter), settings["rms_norm_eps"]
    (before,) = settings["eagle_aux_hidden_state_layer_ids"]
    hidden = functional.linear(states[before][:, :-1], tensors["fc.weight"])
    embeds = served.trunk.model.embed_tokens(tokens[:, 1:])
    for number in range(settings["num_hidden_layers"]):
        layer = {
            name.split(".", 1 if number == 0 else 2)[-1]: value
            for name, value in tensors.items()
            if name.startswith("midlayer." if number == 0 else f"layers.{number}.")
        }
        if number == 0:
            normed = rms(hidden, layer["hidden_norm.weight"], eps)
            normed = torch.cat((rms(embeds, layer["input_layernorm.weight"], eps), normed), -1)
        else:
            normed = rms(hidden, layer["input_layernorm.weight"], eps)
            assert torch.equal(layer["input_layernorm.weight"], layer["hidden_norm.weight"])
        hidden = hidden + _attention(served, settings, layer, normed)
        normed = rms(hidden, layer["post_attention_layernorm.weight"], eps)
        gate = functional.silu(functional.linear(normed, layer["mlp.gate_proj.weight"]))
        up = functional.linear(normed, layer["mlp.up_proj.weight"])
        hidden = hidden + functional.linear(gate * up, layer["mlp.down_proj.weight"])
    matrix = tensors.get("lm_head.weight", served.trunk.lm_head.weight)
    scores = functional.linear(rms(hidden, tensors["norm.weight"], eps), matrix)
    if "d2t" not in tensors:
        return scores
    ids = torch.arange(settings["draft_vocab_size"]) + tensors["d2t"]
    assert torch.equal(tensors["t2d"].nonzero()[:, 0], ids)
    return _scattered(scores, ids, settings["vocab_size"])


def _attention(served: Served, settings: dict[str, Any], layer: dict[str, Tensor], normed: Tensor) -> Tensor:
    def projected(name: str, given: Tensor) -> Tensor:
        bias = layer[f"self_attn.{name}.bias"] if settings["attention_bias"] else None
        return functional.linear(given, layer[f"self_attn.{name}.weight"], bias)

    def by_head(name: str) -> Tensor:
        return projected(name, normed).unflatten(-1, (-1, settings["head_dim"])).transpose(1, 2)

    length = normed.shape[1]
    cos, sin = (one[:, None] for one in served.trunk.model.rotary_emb(normed, torch.arange(length)[None]))

    def turned(vectors: Tensor) -> Tensor:
        first, second = vectors.chunk(2, -1)
        return vectors * cos + torch.cat((-second, first), -1) * sin

    groups = settings["num_attention_heads"] // settings["num_key_value_heads"]
    keys, values = (one.repeat_interleave(groups, 1) for one in (turned(by_head("k_proj")), by_head("v_proj")))
    mixed = functional.scaled_dot_product_attention(turned(by_head("q_proj")), keys, values, is_causal=True)
    return projected("o_proj", mixed.transpose(1, 2).flatten(2))
