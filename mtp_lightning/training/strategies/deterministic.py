"""Kernels that give the same bits for the same input, where a recipe asks for them."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from mtp_lightning.errors import TrainingError
from mtp_lightning.recipe.schema.root import Recipe

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
FIXED = (":4096:8", ":16:8")  # workspaces with which cuBLAS's sums have a fixed order
WAIT = "Export it before Python starts, or set run.deterministic=false."


@contextlib.contextmanager
def deterministic_kernels(recipe: Recipe) -> Iterator[None]:
    """Have torch take deterministic kernels in the body, if the recipe says so, and give back what was set before.

    An operation that has none raises torch's RuntimeError, which names it. To be entered before CUDA starts: cuBLAS
    reads its variable once.

    Raises:
        TrainingError: The variable has another value, or CUDA has started without it.
    """
    if not recipe.run.deterministic:
        yield
        return
    variable = os.environ.get(VARIABLE)
    if variable is not None and variable not in FIXED:
        raise TrainingError(
            f"{VARIABLE} must be {' or '.join(FIXED)} for run.deterministic=true", variable, f"Unset {VARIABLE}."
        )
    if variable is None and _has_cuda_started():
        raise TrainingError(
            f"{VARIABLE} must be set before CUDA starts, for run.deterministic=true", "CUDA started without it", WAIT
        )
    cudnn, memory = torch.backends.cudnn, cast(Any, torch.utils.deterministic)
    fills = memory.fill_uninitialized_memory
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    before_cudnn = (cudnn.deterministic, cudnn.benchmark)
    try:
        os.environ[VARIABLE] = variable or FIXED[0]
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # nothing here reads any, and ZeRO makes much
        cudnn.deterministic, cudnn.benchmark = True, False
        yield
    finally:
        if variable is None and not _has_cuda_started():  # else cuBLAS has read it, and the next such run may begin
            os.environ.pop(VARIABLE, None)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fills
        cudnn.deterministic, cudnn.benchmark = before_cudnn


def _has_cuda_started() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


class DeterministicKernels(Callback):
    """`deterministic_kernels` under a Trainer of the user's own: from when this is made until the Trainer is done."""

    def __init__(self, recipe: Recipe) -> None:
        """Begin, before Lightning chooses a device."""
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(deterministic_kernels(recipe))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give back what was set before."""
        self._stack.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Do so as well."""
        self._stack.close()
