"""Errors that are a machine's fault and not the run's: the machine is named, so that the next start leaves it out."""

import os
import platform
from pathlib import Path

from mtp_lightning.errors import BadNodeError, LoaderError

SYMPTOMS = (
    "uncorrectable ECC",
    "uncorrectable NVLink",
    "hardware stack error",
    "GPU is lost",
    "fallen off the bus",
    "device is in an unusable state",
    "no CUDA-capable device",
    "all CUDA-capable devices are busy or unavailable",
)
"""What CUDA says of a broken GPU. What a program can cause too, such as illegal addresses, is not among them."""


def as_hardware_error(error: BaseException, run_folder: Path) -> BadNodeError | None:
    """Return the error of a broken machine and note its name in logs/bad_nodes; None for any other error."""
    symptom = next((symptom for symptom in SYMPTOMS if symptom.lower() in str(error).lower()), None)
    if symptom is None:
        return None
    node = os.environ.get("SLURMD_NODENAME") or platform.node()
    with (run_folder / "logs/bad_nodes").open("a", encoding="utf-8") as file:
        file.write(f"{node}\n")
    return BadNodeError(
        "a node must have sound GPUs",
        f"{node}: {str(error).splitlines()[0]}",
        f"Leave {node} out (a job of `mtp submit` does so by itself) and tell who looks after it",
    )


def as_loader_error(error: BaseException) -> LoaderError | None:
    """Return the error of a loader process that was killed; None for any other error."""
    found = next(iter(str(error).splitlines()), "")
    if not (isinstance(error, RuntimeError) and found.startswith("DataLoader worker")):
        return None
    return LoaderError(
        "the processes that load data (data.workers) must live as long as the training",
        found,
        "Memory may have run out: lower data.workers, or set it to 0. The same command goes on where a checkpoint is",
    )
