"""Mixtures of the trunk's layers: each head reads softmax(w / T) over them [Mehra 2025, arXiv 2502.09419].

One running sum per mixture goes along with the trunk's forward; the layers are never stacked. With N mixtures and L
layers that is N states beside the ones that the layers keep for their own backward pass, and a head needs its mixture
in any case. The gradient of w needs the layers' outputs: where the trunk is trained, its layers keep them anyway as
their inputs, and the sums refer to the same memory; a frozen trunk keeps these L states and nothing else.
"""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from mtp_lightning.recipe.schema.model import LayerMixSection


@final
class ScalarMix(nn.Module):
    """How much one head reads of each layer."""

    def __init__(self, num_layers: int, section: LayerMixSection) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_layers))
        self.temperature = section.temperature

    def forward(self) -> Tensor:
        """Compute the layers' shares, which sum to one: (L,), in fp32 or better."""
        exact = torch.promote_types(self.weight.dtype, torch.float32)
        return torch.softmax(self.weight.to(exact) / self.temperature, dim=0)


@final
class Sums:
    """Running sums of the layers' outputs, one for each mixture."""

    def __init__(self, shares: Mapping[int, Tensor]) -> None:
        """Begin empty; `shares` has (L,) for each sum."""
        self.shares = shares
        self.states: dict[int, Tensor] = {}

    def add(self, layer: int, hidden: Tensor) -> None:
        """Add a layer's output, (B, T, D)."""
        for key, shares in self.shares.items():
            share = shares[layer].to(hidden.dtype)
            if layer == 0:
                self.states[key] = hidden * share
            else:
                self.states[key].addcmul_(hidden, share)
