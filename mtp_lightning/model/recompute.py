"""Forward passes that are run again in the backward pass, so that what they compute is not kept until then."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def recomputed(run: Callable[..., Tensor], *inputs: Any, on_host: bool = False, draws: bool = True) -> Tensor:
    """Call `run`; only its inputs are kept for the backward pass, or copies of them in the host's memory.

    With `draws` the random generators are read and put back too, so that `run` draws the same again.
    """
    with saved_tensors_hooks(_to_host, _from_host) if on_host else nullcontext():
        output: Tensor = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=draws)
    return output


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """Copy in the order of the GPU's own work, for which the host does not wait: nobody reads the copy but the GPU."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    copy.copy_(tensor, non_blocking=True)
    return tensor.device, copy


def _from_host(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, copy = packed
    return copy.to(device, non_blocking=True)
