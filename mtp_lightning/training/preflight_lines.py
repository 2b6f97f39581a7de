"""What a check of `mtp preflight` says: a line, ok or with a remedy, the same on all ranks."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mtp_lightning.errors import MtpError
from mtp_lightning.launch.seat import find_seat
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe import Recipe

Check = Callable[[Recipe, torch.device], str]


class Failure(Exception):
    """A check that has found something."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.found, self.remedy = found, remedy


@dataclass(frozen=True)
class Line:
    """The outcome of a check."""

    name: str
    found: str
    remedy: str | None = None  # None: all is well

    def __str__(self) -> str:
        mark = "ok  " if self.remedy is None else "FAIL"
        return f"{mark} {self.name:<12} {self.found}" + (f". {self.remedy}" if self.remedy else "")


def line_of(name: str, check: Check, recipe: Recipe, device: torch.device) -> Line:
    """Run a check; what it finds on one rank alone, all ranks learn."""
    try:
        line = Line(name, check(recipe, device))
    except Failure as failure:
        line = Line(name, failure.found, failure.remedy)
    except MtpError as error:
        line = Line(name, f"{error.must_hold}; found {error.found}", error.remedy)
    except OSError as error:
        line = Line(name, f"{error.strerror}: {error.filename}", "Repair access")
    ranks = Ranks()
    lines = ranks.gather((platform.node(), line))
    for rank, (host, other) in enumerate(lines):
        if other.remedy is not None:
            line = Line(name, f"rank {rank} on {host}: {other.found}", other.remedy)
            break
    if ranks.is_first:
        print(line, flush=True)
    return line


def name_and_free_bytes(device: torch.device) -> tuple[str, int]:
    """Name this rank's device, and say how much of its memory is free."""
    if device.type == "cpu":
        return platform.machine(), os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    seat = find_seat(os.environ)
    index = seat.local_rank if seat else 0
    if index >= torch.cuda.device_count():
        return "no GPU", 0
    return torch.cuda.get_device_name(index), torch.cuda.mem_get_info(index)[0]
