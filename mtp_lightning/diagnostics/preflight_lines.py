"""What a check of `mtp preflight` says: a line, ok or with a hint, the same on all ranks."""

import os
import platform
import traceback
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mtp_lightning.errors import MtpError
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe import Recipe

Check = Callable[[Recipe, torch.device], str]


class Failure(Exception):
    """A check that has found something."""

    def __init__(self, found: str, hint: str) -> None:
        super().__init__(found)
        self.found, self.hint = found, hint


@dataclass(frozen=True)
class Line:
    """The outcome of a check."""

    name: str
    found: str
    hint: str | None = None  # None: all is well

    def __str__(self) -> str:
        mark = "ok  " if self.hint is None else "FAIL"
        return f"{mark} {self.name:<12} {self.found}" + (f". {self.hint}" if self.hint else "")


def line_of(name: str, check: Check, recipe: Recipe, device: torch.device) -> Line:
    """Run a check; what it finds on one rank alone, all ranks learn."""
    try:
        line = Line(name, check(recipe, device))
    except Failure as failure:
        line = Line(name, failure.found, failure.hint)
    except MtpError as error:
        line = Line(name, f"{error.expected}; found {error.found}", error.hint)
    except OSError as error:
        line = Line(name, f"{error.strerror}: {error.filename}", "Repair access")
    except RuntimeError as error:  # CUDA, NCCL and gloo
        traceback.print_exc()
        line = Line(name, f"{type(error).__name__}: {str(error).splitlines()[0]}", "Look at the traceback of this rank")
    ranks = Ranks()
    lines = ranks.gather((platform.node(), line))
    for rank, (host, other) in enumerate(lines):
        if other.hint is not None:
            line = Line(name, f"rank {rank} on {host}: {other.found}", other.hint)
            break
    if ranks.is_first:
        print(line, flush=True)
    return line


def name_and_free_bytes(device: torch.device) -> tuple[str, int]:
    """Name this rank's device, and say how much of its memory is free."""
    if device.type == "cpu":
        return platform.machine(), os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0]
