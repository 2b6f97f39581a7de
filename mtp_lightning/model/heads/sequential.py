"""Sequential modules: state of the offset before plus the token in between [DeepSeek-V3, section 2.2]."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mtp_lightning.model.heads.base import HeadContext, Heads
from mtp_lightning.model.layers import Geometry, build_norm, build_stack
from mtp_lightning.recipe.schema.model import HeadsSection, ModelSection


class MtpModule(nn.Module):
    """Norm the state and the token's embedding, project the pair from 2D to D, run transformer layers."""

    def __init__(self, model: ModelSection, heads: HeadsSection, *, recompute: bool) -> None:
        super().__init__()
        self.embedding_first = heads.concatenation == "embedding_first"
        self.enorm = build_norm(model)
        self.hnorm = build_norm(model)
        self.eh_proj = nn.Linear(2 * model.hidden_size, model.hidden_size, bias=False)
        self.layers = build_stack(model, heads.layers_per_head, recompute=recompute)

    def forward(self, state: Tensor, embedded: Tensor, geometry: Geometry) -> Tensor:
        """Compute the next offset's state: two (B, T, D) -> (B, T, D)."""
        hidden, token = self.hnorm(state), self.enorm(embedded)
        pair = (token, hidden) if self.embedding_first else (hidden, token)
        joined = self.eh_proj(torch.cat(pair, dim=-1))  # (B, T, 2D) -> (B, T, D)
        joined = joined.to(state.dtype)  # autocast lowers it; the residual stream stays as it was
        output: Tensor = self.layers(joined, geometry)
        return output


class SequentialHeads(Heads):
    """Offset 1 is the trunk's output; offset k reads offset k-1's state and the token at t+k-1."""

    reads_tokens = True

    def __init__(self, model: ModelSection, heads: HeadsSection, *, recompute: bool) -> None:
        super().__init__(heads)
        self.blocks = nn.ModuleList(MtpModule(model, heads, recompute=recompute) for _ in range(heads.num_offsets - 1))

    def modules_of(self, offset: int) -> Sequence[nn.Module]:
        """The offset's module; none for the main head."""
        return [self.blocks[offset - 2]] if offset > 1 else []

    def first_map(self, offset: int) -> tuple[nn.Linear, int] | None:
        """The module's projection, before its layers."""
        return (cast(MtpModule, self.blocks[offset - 2]).eh_proj, self.section.layers_per_head) if offset > 1 else None

    def norm_index(self, offset: int) -> int:
        """The trunk has the model's final norm, every module its own."""
        return offset - 1

    def forward(self, offset: int, state: Tensor, context: HeadContext) -> Tensor:
        """Run the offset's module: (B, T, D) -> (B, T, D)."""
        if offset == 1:
            return state
        hidden: Tensor = self.blocks[offset - 2](state, context.tokens_between(offset), context.geometry)
        return hidden
