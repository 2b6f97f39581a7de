"""The trunk: token embedding and every layer before the heads."""

from torch import Tensor, nn

from mtp_lightning.model.layers import LayerStack
from mtp_lightning.model.positions import AttentionInputs
from mtp_lightning.model.scalar_mix import Sums
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
