"""Where this rank's time goes in a step: data, forward, backward, reduce, step.

Marks divide time: what lies between two belongs to the part that the later one names. On a GPU marks are events in its
stream, read when they have passed, so no step waits for them; what the host or another rank holds up counts there as
the GPU stands still. On a CPU marks are the clock's.
"""

import time
from collections import deque
from typing import Any, final

import torch

from mtp_lightning.ranks import Ranks

PARTS = ("data", "forward", "backward", "reduce", "step")

Mark = tuple[str | None, Any]  # the part that ends, and when: seconds of a clock, or an event


@final
class StepTimes:
    """Seconds of this rank per part since the last logged step; the first step of a start has no data to wait for."""

    def __init__(self, device: torch.device) -> None:
        """Measure on a device, from `begin` on."""
        self._is_cuda = device.type == "cuda"
        self._marks: deque[Mark] = deque()
        self._spent_s = dict.fromkeys(PARTS, 0.0)
        self._num_steps = 0

    def begin(self) -> None:
        """Mark where the wait for rows begins; what was before, a validation or a save, belongs to no part."""
        self._settle()
        self._mark(None)

    def end(self, part: str) -> None:
        """Mark where a part ends."""
        self._mark(part)
        self._num_steps += part == PARTS[-1]

    def _mark(self, part: str | None) -> None:
        if not self._is_cuda:
            self._marks.append((part, time.perf_counter()))
            return
        event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._marks.append((part, event))

    def _settle(self, *, wait: bool = False) -> None:
        """Add up what has passed, and forget it; the last mark stays, from which the next counts."""
        while len(self._marks) > 1:
            (_, before), (part, after) = self._marks[0], self._marks[1]
            if not self._is_cuda:
                spent_s = after - before
            elif wait or after.query():
                after.synchronize()
                spent_s = before.elapsed_time(after) / 1e3
            else:
                return
            if part is not None:
                self._spent_s[part] += spent_s
            self._marks.popleft()

    def lap(self, ranks: Ranks) -> dict[str, float]:
        """Seconds per step of each part, its mean, least and most over the ranks, and begin anew; all ranks call it."""
        self._settle(wait=True)
        own = torch.tensor(list(self._spent_s.values()), dtype=torch.float64) / max(self._num_steps, 1)
        means = (ranks.sum(own) / ranks.size).tolist()
        greatest = ranks.max(torch.cat((own, -own))).tolist()
        self._spent_s, self._num_steps = dict.fromkeys(PARTS, 0.0), 0
        figures: dict[str, float] = {}
        for place, part in enumerate(PARTS):
            least_s, most_s = -greatest[place + len(PARTS)], greatest[place]
            figures |= {f"time/{part}_s": means[place], f"time/{part}_min_s": least_s, f"time/{part}_max_s": most_s}
        return figures
