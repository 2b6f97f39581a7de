"""What a server can be asked for."""

import contextlib
import ctypes
import logging
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed.runtime.engine
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401, which engines import; before a fork
from torch._subclasses.fake_tensor import FakeTensorMode

from mtp_lightning.diagnostics import preflight as checks
from mtp_lightning.diagnostics.preflight_trial import Failure, name_and_free_bytes
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training.strategies.device import prepare_device
from mtp_lightning.training.strategies.process_group import process_group
from tests.support.fake_cuda.breakages import BREAKAGES
from tests.support.fake_cuda.decoding import run_decoding
from tests.support.fake_cuda.fits import of_package, run_fit
from tests.support.fake_cuda.ledger import Ledger
from tests.support.fake_cuda.patches import operators, torch_cuda


def fit(guard: ctypes.CDLL, path: str, overrides: list[str], **options: Any) -> dict[str, Any]:
    """Run a fit of a recipe."""
    return asdict(run_fit(guard, load_recipe(Path(path), overrides).recipe, **options))


def preflight(
    guard: ctypes.CDLL, path: str, overrides: list[str], rank: int, without: str | None = None
) -> dict[str, Any]:
    """Join the other ranks, and look at device and network, as `mtp preflight` does."""
    recipe, ledger = load_recipe(Path(path), overrides).recipe, Ledger()
    broken = BREAKAGES[without]() if without else ()
    with contextlib.ExitStack() as stack:
        for patch in (*torch_cuda(guard), *operators(), *of_package(ledger, recipe, rank), *broken):
            stack.enter_context(patch)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(ledger)
        with process_group(recipe):
            device = prepare_device(recipe)
            name, _ = name_and_free_bytes(device)
            with contextlib.suppress(Failure):  # sums have no values
                checks._network(recipe, device)
    joined, *_ = (own.name for own in ledger.collectives)
    return {
        "joined": joined,
        "named": name,
        "reduced on": [own.device for own in ledger.collectives if own.name == "allreduce_"],
    }


def decode(guard: ctypes.CDLL, path: str, overrides: list[str], **options: Any) -> dict[str, Any]:
    """Take one step of a decoder."""
    return run_decoding(guard, load_recipe(Path(path), overrides).recipe, **options)


JOBS: dict[str, Callable[..., Any]] = {"fit": fit, "preflight": preflight, "decode": decode}


def run(name: str, guard: ctypes.CDLL, **arguments: Any) -> Any:
    """Run a job by its name, without remarks of libraries."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    return JOBS[name](guard, **arguments)
