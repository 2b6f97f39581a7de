"""Medusa heads: residual SiLU blocks on the normed trunk output [Cai 2024, section 2.1]."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.model.heads.base import HeadContext, Heads
from mtp_lightning.recipe.schema.model import HeadsSection, ModelSection


class ResidualBlock(nn.Module):
    """Add SiLU of a linear map; the map starts at zero, so that the block starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Transform each position: (B, T, D) -> (B, T, D)."""
        return hidden + F.silu(self.linear(hidden))


class MedusaHeads(Heads):
    """Offset 1 is the trunk's output itself; further offsets pass blocks after the final norm, and no norm since."""

    def __init__(self, model: ModelSection, heads: HeadsSection, *, recompute: bool) -> None:
        super().__init__(heads)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(model.hidden_size) for _ in range(heads.layers_per_head)))
            for _ in range(heads.num_offsets - 1)
        )

    def modules_of(self, offset: int) -> Sequence[nn.Module]:
        """The offset's blocks; none for the main head."""
        return [self.blocks[offset - 2]] if offset > 1 else []

    def norm_index(self, offset: int) -> int | None:
        """Only the main head's state still has to be normed."""
        return 0 if offset == 1 else None

    def forward(self, offset: int, state: Tensor, context: HeadContext) -> Tensor:
        """Run the offset's blocks on the normed trunk output: (B, T, D) -> (B, T, D)."""
        if offset == 1:
            return state
        output: Tensor = self.blocks[offset - 2](state)
        return output
