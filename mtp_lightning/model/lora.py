"""Low-rank updates of linear maps, W + alpha / rank x B A, beside frozen weights [Hu 2021, arXiv 2106.09685]."""

import math
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.model.layers import layers_of
from mtp_lightning.model.roles import LORA
from mtp_lightning.recipe.schema.model import LoraSection, Target

UP, DOWN = f".{LORA}.up", f".{LORA}.down"
PROJECTIONS: dict[Target, str] = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


@final
class LowRank(nn.Module):
    """The update alone; B starts at zero, so that it starts as no update."""

    def __init__(self, width_in: int, width_out: int, section: LoraSection) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(section.rank, width_in))  # A
        self.up = nn.Parameter(torch.empty(width_out, section.rank))  # B
        self.scale = section.alpha / section.rank
        self.dropout = section.dropout

    def forward(self, hidden: Tensor) -> Tensor:
        """Compute what is added: (B, T, D) -> (B, T, E)."""
        read = F.dropout(hidden, self.dropout, training=self.training)
        return F.linear(F.linear(read, self.down), self.up) * self.scale


@final
class LoraLinear(nn.Linear):
    """A linear map with an update; weight and bias keep the names that they have without."""

    def __init__(self, plain: nn.Linear, section: LoraSection) -> None:
        has_bias = plain.bias is not None
        super().__init__(plain.in_features, plain.out_features, bias=has_bias, device=plain.weight.device)
        self.lora = LowRank(plain.in_features, plain.out_features, section)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map and update: (B, T, D) -> (B, T, E)."""
        output: Tensor = super().forward(hidden) + self.lora(hidden)
        return output


def add_updates(part: nn.Module, section: LoraSection) -> None:
    """Replace the targets in every transformer layer of a part of the model, in place; weights are yet to be set."""
    for layer in layers_of(part):
        for target in section.targets:
            owner_name, _, name = PROJECTIONS[target].partition(".")
            owner = layer.get_submodule(owner_name)
            setattr(owner, name, LoraLinear(owner.get_submodule(name), section))  # type: ignore[arg-type]


@torch.no_grad()
def initialise_update(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Set A to a normal draw that keeps the scale of what it reads, B to zero."""
    if name.endswith(UP):
        parameter.zero_()
        return
    exact = torch.promote_types(parameter.dtype, torch.float32)
    drawn = torch.empty(parameter.shape, dtype=exact, device=parameter.device)
    parameter.copy_(drawn.normal_(0.0, 1 / math.sqrt(parameter.shape[1]), generator=generator))


def merged(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Add an update to the weight that it belongs to, in fp32 or better: (E, D), (R, D), (E, R) -> (E, D)."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(exact), up.to(exact), down.to(exact), alpha=scale)
