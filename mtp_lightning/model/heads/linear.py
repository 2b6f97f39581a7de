"""Linear heads: one D x D map per extra offset [Gloeckle 2024, appendix B]."""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from mtp_lightning.model.heads.base import HeadContext, Heads
from mtp_lightning.recipe.schema.model import HeadsSection, ModelSection


class LinearHeads(Heads):
    """Offset 1 is the trunk's output itself; every further offset is a linear map of it.

    With `unembedding: replicated` this is, up to a change of parameters, the paper's replicated-unembedding
    model without head layers: an own matrix after a linear map is an own matrix.
    """

    def __init__(self, model: ModelSection, heads: HeadsSection, *, recompute: bool) -> None:
        super().__init__(heads)
        self.blocks = nn.ModuleList(
            nn.Linear(model.hidden_size, model.hidden_size, bias=False) for _ in range(heads.num_offsets - 1)
        )

    def modules_of(self, offset: int) -> Sequence[nn.Module]:
        """The offset's map; none for the main head."""
        return [self.blocks[offset - 2]] if offset > 1 else []

    def first_map(self, offset: int) -> tuple[nn.Linear, int] | None:
        """The offset's map, with nothing behind it."""
        return (cast(nn.Linear, self.blocks[offset - 2]), 0) if offset > 1 else None

    def forward(self, offset: int, state: Tensor, context: HeadContext) -> Tensor:
        """Map the trunk's output: (B, T, D) -> (B, T, D)."""
        if offset == 1:
            return state
        output: Tensor = self.blocks[offset - 2](state)
        return output.to(state.dtype)  # autocast lowers it; states stay as precise as the residual stream
