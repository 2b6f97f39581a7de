"""The trunk and its layers, of the Llama or GPT-NeoX type; names are HF's for Llama, so that export is a renaming.

With `model.family: transformers` all are that library's own instead; the functions at the end choose.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from mtp_lightning.model.positions import AttentionInputs, rotate
from mtp_lightning.model.recompute import recomputed
from mtp_lightning.model.scalar_mix import Sums
from mtp_lightning.model.transformers_architecture import architecture_of
from mtp_lightning.model.transformers_trunk import ForeignStack, LayerInputs, TransformersTrunk
from mtp_lightning.recipe.schema.model import ModelSection


class Trunk(nn.Module):
    """Token embedding and a stack of layers; the final norm belongs to the unembedding."""

    def __init__(self, section: ModelSection, num_layers: int, *, recompute: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(section.vocab_size, section.hidden_size)
        self.layers = LayerStack(section, num_layers, recompute=recompute)

    def forward(self, embedded: Tensor, geometry: AttentionInputs, *, sums: Sums | None = None) -> tuple[Tensor, ...]:
        """Run the layers on embedded tokens: (B, T, D) -> the last state, then those of `sums`, (B, T, D) each.

        Sums are returned, not only kept in `sums`: ZeRO-3 looks for a module's way back at what it returns, and fails
        where a gradient enters by another door (DeepSpeed 0.19).
        """
        hidden = embedded
        for number, output in enumerate(self.layers.walk(embedded, geometry)):
            hidden = output
            if sums is not None:
                sums.add(number, hidden)
        return (hidden, *(sums.states.values() if sums is not None else ()))


def build_norm(section: ModelSection) -> nn.Module:
    """Build a norm of width D."""
    if section.is_foreign:
        return architecture_of(section).build_norm()
    kind = nn.LayerNorm if section.norm == "layer" else nn.RMSNorm
    return kind(section.hidden_size, section.norm_eps)


class HeadNorm(nn.RMSNorm):
    """RMSNorm of queries or keys in the type they come in.

    Autocast would raise them to fp32 on a GPU; and where only the weight is fp32, torch has no fused kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Norm the channels of each head: (..., W) -> (..., W)."""
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Grouped-query causal attention with rotary positions."""

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.head_dim = section.resolved_head_dim
        self.is_grouped = section.resolved_key_value_heads != section.num_attention_heads
        inner = section.num_attention_heads * self.head_dim
        shared = section.resolved_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(section.hidden_size, inner, bias=section.qkv_bias)
        self.k_proj = nn.Linear(section.hidden_size, shared, bias=section.qkv_bias)
        self.v_proj = nn.Linear(section.hidden_size, shared, bias=section.qkv_bias)
        self.o_proj = nn.Linear(inner, section.hidden_size, bias=section.output_bias)
        self.q_norm = HeadNorm(self.head_dim, section.norm_eps) if section.qk_norm else None
        self.k_norm = HeadNorm(self.head_dim, section.norm_eps) if section.qk_norm else None

    def forward(self, hidden: Tensor, geometry: AttentionInputs) -> Tensor:
        """Mix positions: (B, T, D) -> (B, T, D)."""
        query = self._split(self.q_proj(hidden))  # (B, H, T, W)
        key = self._split(self.k_proj(hidden))  # (B, K, T, W)
        value = self._split(self.v_proj(hidden))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = rotate(query, geometry), rotate(key, geometry)
        if geometry.past is not None:
            key, value = geometry.past.extend(self, key, value)  # (B, K, S, W)
        if geometry.sequence is not None:
            query, key, value = geometry.sequence.to_heads(query, key, value)
        if geometry.bounds is not None:
            mixed = self._inside_documents(query, key, value, geometry.bounds)
        else:
            mixed = self._attend(query, key, value, geometry.mask)
        if geometry.sequence is not None:
            mixed = geometry.sequence.to_positions(mixed)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return output

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from T positions, the last of S: (B, H, T, W), two (B, K, S, W) -> (B, H, T, W)."""
        num_positions, reach = query.shape[2], key.shape[2]
        if mask is None and 1 < num_positions < reach:  # one by one, so that each is computed as if it came alone
            ends = range(reach - num_positions + 1, reach + 1)
            each = zip(torch.split(query, 1, 2), ends, strict=True)
            return torch.cat([self._attend(one, key[:, :, :end], value[:, :, :end], None) for one, end in each], 2)
        if self.is_grouped and num_positions < reach:
            return self._attend_by_group(query, key, value, mask)
        if num_positions == 1 and query.dtype == torch.bfloat16 and query.device.type == "cpu":
            twice = torch.cat([query, query], 2)  # torch's kernel takes three times as long for one row as for two
            mixed = F.scaled_dot_product_attention(twice, key, value, attn_mask=mask, enable_gqa=self.is_grouped)
            return mixed[:, :, :1]
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None and reach == num_positions,
            enable_gqa=self.is_grouped,
        )

    def _attend_by_group(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """Attend to what is kept: heads that share keys are rows of one product, which reads the keys once.

        Args:
            query: (B, H, T, W), H = K x G.
            key: (B, K, S, W).
            value: (B, K, S, W).
            mask: (B or 1, 1, T, S), or None where every row sees all.
        """
        num_groups = query.shape[1] // key.shape[1]
        by_key = query.reshape(*key.shape[:2], -1, query.shape[3])  # (B, K, G x T, W)
        if mask is not None:
            mask = mask.unsqueeze(2).expand(-1, -1, num_groups, -1, -1).flatten(2, 3)  # (B, 1, G x T, S)
        mixed = F.scaled_dot_product_attention(by_key, key, value, attn_mask=mask)
        return mixed.reshape(query.shape)

    def _inside_documents(self, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor) -> Tensor:
        """Attend causally inside documents that lie end to end: (B, H, T, W) -> (B, H, T, W)."""
        num_rows, _, num_positions, _ = query.shape
        further: dict[str, Any] = {"window_size": (-1, 0)} | ({"enable_gqa": True} if self.is_grouped else {})
        q, k, v = (part.transpose(1, 2).flatten(0, 1).to(value.dtype) for part in (query, key, value))  # (B x T, H, W)
        mixed = varlen_attn(q, k, v, bounds, bounds, num_positions, num_positions, **further)
        return cast(Tensor, mixed).view(num_rows, num_positions, *q.shape[1:]).transpose(1, 2)

    def _split(self, projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:-1], -1, self.head_dim).transpose(1, 2)


class Mlp(nn.Module):
    """Feed-forward: SwiGLU, or a GELU between two matrices.

    Attributes:
        tile: positions that are run at a time, and once more for the backward pass; None: all, and once.
    """

    tile: int | None = None

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        inner, bias = section.resolved_intermediate_size, section.mlp_bias
        self.gate_proj = nn.Linear(section.hidden_size, inner, bias=bias) if section.mlp == "swiglu" else None
        self.up_proj = nn.Linear(section.hidden_size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, section.hidden_size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Transform each position: (B, T, D) -> (B, T, D)."""
        if self.tile is None or hidden.shape[1] <= self.tile:
            return self._run(hidden)
        tiles = torch.split(hidden, self.tile, 1)
        return torch.cat([recomputed(self._run, tile) if tile.requires_grad else self._run(tile) for tile in tiles], 1)

    def _run(self, hidden: Tensor) -> Tensor:
        inner = self.up_proj(hidden)
        inner = F.gelu(inner) if self.gate_proj is None else F.silu(self.gate_proj(hidden)) * inner
        output: Tensor = self.down_proj(inner)
        return output


class Layer(nn.Module):
    """Pre-norm transformer layer: attention, then feed-forward, each added to its input; or both at once."""

    def __init__(self, section: ModelSection) -> None:
        super().__init__()
        self.is_parallel = section.parallel_residual
        self.input_layernorm = build_norm(section)
        self.self_attn = Attention(section)
        self.post_attention_layernorm = build_norm(section)
        self.mlp = Mlp(section)

    def forward(self, hidden: Tensor, geometry: AttentionInputs) -> Tensor:
        """Run the layer: (B, T, D) -> (B, T, D)."""
        attended = hidden + self.self_attn(self.input_layernorm(hidden), geometry)
        read = hidden if self.is_parallel else attended
        output: Tensor = attended + self.mlp(self.post_attention_layernorm(read))
        return output


class LayerStack(nn.ModuleList):
    """Layers run one after the other; with `recompute`, only their inputs are kept for the backward pass.

    Attributes:
        on_host: these inputs are kept in the host's memory.
    """

    on_host: bool = False

    def __init__(self, section: ModelSection, num_layers: int, *, recompute: bool) -> None:
        super().__init__(Layer(section) for _ in range(num_layers))
        self.recompute = recompute

    def forward(self, hidden: Tensor, geometry: AttentionInputs) -> Tensor:
        """Run every layer: (B, T, D) -> (B, T, D)."""
        for output in self.walk(hidden, geometry):
            hidden = output
        return hidden

    def walk(self, hidden: Tensor, geometry: AttentionInputs) -> Iterator[Tensor]:
        """Run every layer on the output of the one before, (B, T, D), and yield the output of each."""
        again = self.recompute and torch.is_grad_enabled()
        draws = again and any(getattr(part, "dropout", 0.0) for part in self.modules())  # updates of low rank may
        for layer in self:
            if again:
                hidden = recomputed(layer, hidden, geometry, on_host=self.on_host, draws=draws)
            else:
                hidden = layer(hidden, geometry)
            yield hidden


def build_trunk(section: ModelSection, num_layers: int, *, recompute: bool) -> Trunk | TransformersTrunk:
    """Build the trunk."""
    kind = TransformersTrunk if section.is_foreign else Trunk
    return kind(section, num_layers, recompute=recompute)


def build_stack(section: ModelSection, num_layers: int, *, recompute: bool) -> LayerStack | ForeignStack:
    """Build a stack of layers of the trunk's type, for a head."""
    kind = ForeignStack if section.is_foreign else LayerStack
    return kind(section, num_layers, recompute=recompute)


def layers_of(part: nn.Module) -> list[nn.Module]:
    """List the transformer layers in a part of the model."""
    return [module for module in part.modules() if isinstance(module, Layer) or hasattr(module, "like_layer")]


Geometry = AttentionInputs | LayerInputs
