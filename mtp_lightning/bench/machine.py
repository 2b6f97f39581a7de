"""What a figure was measured on."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from mtp_lightning.errors import TrainingError
from mtp_lightning.recipe.sections import Recipe


@dataclass(frozen=True)
class Machine:
    """Device and software of a measurement."""

    device: str  # "cpu" or "cuda"
    name: str
    threads: int
    torch: str
    load: float  # share of the cores that was busy when this was asked

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}, " if self.device == "cpu" else ""
        return f"{self.name} ({threads}torch {self.torch})"


def prepare_device(recipe: Recipe) -> torch.device:
    """Choose the device that the recipe asks for and set its number of threads.

    Raises:
        TrainingError: The recipe asks for CUDA and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if recipe.run.device == "cuda" and not has_cuda:
        raise TrainingError(
            "run.device=cuda needs a CUDA device and a torch that can use it",
            f"none (torch {torch.__version__})",
            "Give run.device=cpu, or run where there is a GPU.",
        )
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    return torch.device("cuda" if has_cuda and recipe.run.device != "cpu" else "cpu")


def describe_machine(device: torch.device) -> Machine:
    """Name the device, its threads, the version of torch, and how busy others keep the machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    return Machine(device.type, name, torch.get_num_threads(), torch.__version__, load)


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else os.uname().machine}, {os.cpu_count()} cores"
