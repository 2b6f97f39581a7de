"""Low-rank updates of linear maps, W + alpha / rank x B A, beside frozen weights [Hu 2021, arXiv 2106.09685]."""

import functools
import math
from collections.abc import Hashable
from typing import cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.errors import CheckpointError
from mtp_lightning.model.layers import Layer, layers_of
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


FOREIGN_NAMES: dict[Target, tuple[str, ...]] = {
    "q": ("q_proj", "q_a_proj", "q_b_proj", "qkv_proj", "query_key_value", "Wqkv", "in_proj_qkvz"),
    "k": ("k_proj", "kv_a_proj_with_mqa", "kv_b_proj", "qkv_proj", "query_key_value", "Wqkv", "in_proj_qkvz"),
    "v": ("v_proj", "kv_a_proj_with_mqa", "kv_b_proj", "qkv_proj", "query_key_value", "Wqkv", "in_proj_qkvz"),
    "o": ("o_proj", "out_proj", "self_attn.dense", "attention.dense", "self_attention.dense"),
    "gate": ("gate_proj", "gate_up_proj"),
    "up": ("up_proj", "gate_up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h"),
    "down": ("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h"),
}
"""What the targets are called in layers of transformers, at the end of their paths; a fused matrix is several at once,
and is updated whole."""


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
    """Replace the targets in every transformer layer of a part of the model, in place; weights are yet to be set.

    Raises:
        CheckpointError: The layers are transformers' own, and some target is in none of them a linear map.
    """
    missing = set(section.targets)
    layers = layers_of(part)
    for layer in layers:
        for target in section.targets:
            for path, plain in _maps_of(layer, target):
                missing.discard(target)
                if not isinstance(plain, LoraLinear):  # updated already, as another target of a fused matrix
                    owner, _, name = path.rpartition(".")
                    setattr(layer.get_submodule(owner), name, LoraLinear(plain, section))
    if layers and missing:
        linear = {path for layer in layers for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
        raise CheckpointError(
            "every one of adapt.lora.targets must be a linear map in some layer",
            f"{', '.join(sorted(missing))}; linear are {', '.join(sorted(linear)) or 'none'}",
            "Choose targets among these; experts that are kept in one tensor cannot be updated",
        )


def _maps_of(layer: nn.Module, target: Target) -> list[tuple[str, nn.Linear]]:
    """List the linear maps of a layer that a target means."""
    if isinstance(layer, Layer):
        path = PROJECTIONS[target]
        return [(path, cast(nn.Linear, layer.get_submodule(path)))]
    ends = tuple(f".{name}" for name in FOREIGN_NAMES[target])
    return [
        (path, module)
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear) and f".{path}".endswith(ends) and _is_plain(cast(Hashable, type(module)))
    ]


@functools.cache
def _is_plain(kind: Hashable) -> bool:
    """Tell whether a class of linear maps computes what its base class does."""
    if kind in (nn.Linear, LoraLinear):
        return True
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        trial, hidden = cast(type[nn.Linear], kind)(3, 2), torch.randn(4, 3)
        return torch.allclose(trial(hidden), F.linear(hidden, trial.weight, trial.bias))


@torch.no_grad()
def initialise_update(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Set A to a normal draw that keeps the scale of what it reads, B to zero."""
    if name.endswith(UP):
        parameter.zero_()
        return
    exact = torch.promote_types(parameter.dtype, torch.float32)
    drawn = torch.empty(parameter.shape, dtype=exact)
    parameter.copy_(drawn.normal_(0.0, 1 / math.sqrt(parameter.shape[1]), generator=generator))


def merged(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Add an update to the weight that it belongs to, in fp32 or better: (E, D), (R, D), (E, R) -> (E, D)."""
    exact = torch.promote_types(weight.dtype, torch.float32)
    return torch.addmm(weight.to(exact), up.to(exact), down.to(exact), alpha=scale)
