"""What a figure was measured on."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch


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


def describe_machine(device: torch.device) -> Machine:
    """Name the device, its threads, the version of torch, and how busy others keep the machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    return Machine(device.type, name, torch.get_num_threads(), torch.__version__, load)


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else os.uname().machine}, {os.cpu_count()} cores"
