"""Recursive heads: one sequential module unrolled over all extra offsets [FastMTP 2025]."""

from collections.abc import Sequence

from torch import Tensor, nn

from mtp_lightning.model.heads.base import HeadContext, Heads
from mtp_lightning.model.heads.sequential import MtpModule
from mtp_lightning.recipe.schema.model import HeadsSection, ModelSection


class RecursiveHeads(Heads):
    """Like sequential heads, with the same module (and module norm) for every extra offset."""

    reads_tokens = True

    def __init__(self, model: ModelSection, heads: HeadsSection, *, recompute: bool) -> None:
        super().__init__(heads)
        self.block = MtpModule(model, heads, recompute=recompute) if heads.num_offsets > 1 else None

    def modules_of(self, offset: int) -> Sequence[nn.Module]:
        """The one module; none for the main head."""
        return [] if offset == 1 or self.block is None else [self.block]

    def first_map(self, offset: int) -> tuple[nn.Linear, int] | None:
        """The module's projection, before its layers."""
        return None if offset == 1 or self.block is None else (self.block.eh_proj, self.section.layers_per_head)

    def norm_index(self, offset: int) -> int:
        """The trunk has the model's final norm, the module its own."""
        return min(offset - 1, 1)

    def forward(self, offset: int, state: Tensor, context: HeadContext) -> Tensor:
        """Run the module once more: (B, T, D) -> (B, T, D)."""
        if offset == 1 or self.block is None:
            return state
        hidden: Tensor = self.block(state, context.tokens_between(offset), context.geometry)
        return hidden
