"""The most memory that was in use at any moment, per device."""

import re
from pathlib import Path

import torch

from mtp_lightning.errors import TrainingError

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"

MALLOC_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes glibc return freed tensors to the system at once, so that resident memory is memory in use."""


class PeakMeter:
    """Peak memory since the last reset, above what was in use when the meter was made.

    On CUDA these are the statistics of torch's allocator: bytes of live tensors and workspaces. On the CPU it is the
    peak of the process's resident memory as the kernel keeps it (VmHWM). That counts everything, also what torch's
    libraries allocate by themselves, and is an honest measure of tensors under two conditions, which
    `mtp bench memory` provides: a fresh process, and an allocator that returns freed memory to the system at once
    (`MALLOC_ENVIRONMENT`); otherwise pages that an earlier step left behind would count, too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.baseline_bytes = self._current_bytes()

    def reset(self) -> None:
        """Forget earlier peaks.

        Where the kernel does not allow that for resident memory, the peak since the start of the process stands.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            CLEAR_REFS.write_text(RESET_PEAK)
        except OSError:
            return

    def peak_bytes(self) -> int:
        """Return the peak since the last reset, above the baseline."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device) - self.baseline_bytes
        return _status_bytes("VmHWM") - self.baseline_bytes

    def _current_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    """Read a field of the kernel's account of this process."""
    found = re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise TrainingError(
            f"measuring memory on the CPU needs {field} in {STATUS}",
            "a kernel that does not report it",
            "Measure on an ordinary Linux kernel, or on a GPU.",
        )
    return 1024 * int(found[1])
