"""Chained heads: hidden states handed from offset to offset, no token fed in [Gloeckle 2024, appendix B]."""

from collections.abc import Sequence

from torch import Tensor, nn

from mtp_lightning.model.heads.base import HeadContext, Heads
from mtp_lightning.model.layers import build_stack
from mtp_lightning.recipe.schema.model import HeadsSection, ModelSection


class ChainedHeads(Heads):
    """One stack of layers per offset, in a chain: causal 1, 2, ... n, or anticausal n, ... 2, 1."""

    def __init__(self, model: ModelSection, heads: HeadsSection, *, recompute: bool) -> None:
        super().__init__(heads)
        self.blocks = nn.ModuleList(
            build_stack(model, heads.layers_per_head, recompute=recompute) for _ in self.offsets
        )

    def modules_of(self, offset: int) -> Sequence[nn.Module]:
        """The offset's own layers."""
        return [self.blocks[offset - 1]]

    def forward(self, offset: int, state: Tensor, context: HeadContext) -> Tensor:
        """Run the offset's layers: (B, T, D) -> (B, T, D)."""
        hidden: Tensor = self.blocks[offset - 1](state, context.geometry)
        return hidden
