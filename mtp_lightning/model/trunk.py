"""The trunk: token embedding and every layer before the heads."""

from collections.abc import Callable

from torch import Tensor, nn

from mtp_lightning.model.geometry import Geometry
from mtp_lightning.model.layers import LayerStack
from mtp_lightning.recipe.model_sections import ModelSection


class Trunk(nn.Module):
    """Token embedding and a stack of layers; the final norm belongs to the unembedding."""

    def __init__(self, section: ModelSection, num_layers: int, *, recompute: bool) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(section.vocabulary, section.width)
        self.layers = LayerStack(section, num_layers, recompute=recompute)

    def forward(
        self, embedded: Tensor, geometry: Geometry, *, seen: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """Run the layers on embedded tokens: (B, T, D) -> (B, T, D); `seen` is shown each layer's number and output."""
        hidden: Tensor = self.layers(embedded, geometry, seen=seen)
        return hidden
