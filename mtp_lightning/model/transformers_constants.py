"""Buffers that are not saved (rotary frequencies, tables, scales), by transformers' own rules."""

from typing import Any

import torch
from torch import Tensor, nn


def restore_constants(model: Any, part: nn.Module) -> None:
    """Compute the buffers of a part anew by transformers' own rules; their module's weights are drawn again, too."""
    for module in part.modules():
        if next(module.buffers(recurse=False), None) is not None:
            model._init_weights(module)


def unset_like(buffer: Tensor) -> Tensor:
    """Return memory for a buffer on the CPU, of NaN where its type has one: so that what stays unset is seen."""
    if buffer.is_floating_point():
        return torch.full_like(buffer, torch.nan, device="cpu")
    return torch.empty_like(buffer, device="cpu")


@torch.no_grad()
def constants_of(model: Any, decoder: nn.Module) -> dict[str, Tensor]:
    """Compute all buffers of a decoder on the meta device, those that one module's rule sets in others included."""
    for module in decoder.modules():
        for name, buffer in [*module.named_buffers(recurse=False)]:
            module._buffers[name] = unset_like(buffer)
    with torch.device("cpu"):
        for module in decoder.modules():
            model._init_weights(module)
    return dict(decoder.named_buffers())
