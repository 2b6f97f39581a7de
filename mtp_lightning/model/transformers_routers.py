"""The load-balancing loss of a mixture of experts, as transformers' own causal model adds it to its loss.

Its gradient enters at the trunk's last state, whatever the backward order: the backward pass that reaches that state
goes on into the routers as well. What is balanced is the trunk; a router in a head of its own gets no such loss.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mtp_lightning.model.transformers_architecture import Architecture

NEEDED = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef")


class RouterLoss:
    """Gathers what the routers of some layers say in a forward pass, and computes their loss.

    Attributes:
        value: loss of the last forward pass, 0-dimensional, without its coefficient; None before the first.
        weight: what its gradient is multiplied by, beside the coefficient.
    """

    def __init__(self, architecture: Architecture, layers: nn.Module) -> None:
        model = architecture.model
        self._function = vars(sys.modules[type(model).__module__])["load_balancing_loss_func"]
        self._num_experts, self._num_chosen, self.coefficient = (getattr(model, name) for name in NEEDED)
        self._logits: list[Tensor] | None = None
        self.value: Tensor | None = None
        self.weight: Tensor | float = 0.0
        recorder = _recorder_of(architecture)
        for module in layers.modules():
            if isinstance(module, recorder.target_class):
                module.register_forward_hook(lambda _, __, output: self._keep(output, recorder.index))

    def _keep(self, output: Any, index: int) -> None:
        if self._logits is not None:  # else a backward pass that computes a layer again
            self._logits.append(output[index] if isinstance(output, tuple | list) else output)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Surround the forward pass of the layers."""
        self._logits = []
        try:
            yield
        finally:
            self._gathered, self._logits = tuple(self._logits), None

    def added_to(self, state: Tensor) -> Tensor:
        """Compute the loss of what was gathered, and let its gradient go along with that of a state."""
        loss = self._function(self._gathered, self._num_experts, self._num_chosen)
        self._gathered = ()
        self.value = loss.detach()
        if not (torch.is_grad_enabled() and loss.requires_grad and state.requires_grad):
            return state
        added: Tensor = _AddedLoss.apply(state, loss, self.coefficient * self.weight)  # type: ignore[no-untyped-call]
        return added


def router_loss_of(architecture: Architecture, layers: nn.Module) -> RouterLoss | None:
    """Return the loss of an architecture whose settings ask for one (`output_router_logits`), else None.

    Nor has a trunk one that kept dense layers only, where the sparse ones went to a head.
    """
    model = architecture.model
    is_asked = bool(getattr(architecture.config, "output_router_logits", False))
    can = hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")
    if not (is_asked and can and all(hasattr(model, name) for name in NEEDED)):
        return None
    recorder = _recorder_of(architecture)
    if recorder is None or not any(isinstance(module, recorder.target_class) for module in layers.modules()):
        return None
    return RouterLoss(architecture, layers)


def _recorder_of(architecture: Architecture) -> Any:
    """Say which modules give the scores of routers, and which of their outputs these are."""
    return (getattr(architecture.decoder, "_can_record_outputs", None) or {}).get("router_logits")


class _AddedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, state: Tensor, loss: Tensor, weight: Tensor | float) -> Tensor:
        ctx.save_for_backward(torch.as_tensor(weight, dtype=loss.dtype, device=loss.device))
        return state.view_as(state)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], ctx.saved_tensors[0], None
