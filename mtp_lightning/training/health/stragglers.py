"""Ranks that hold up all others, named."""

import platform
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mtp_lightning.training.strategies.base import RunStrategy

RATIO = 1.5
LEAST_S = 0.001  # differences below are noise
REPORTS = 3  # in a row, before a rank is named
PROBE_WIDTH = {"cpu": 128, "cuda": 4096}
KINDS = {"fetch_s": "to fetch its rows", "probe_s": "for the same product of matrices"}


@dataclass(frozen=True)
class Pace:
    """What one rank needs by itself, nobody waited for."""

    host: str
    fetch_s: float  # per step, for its rows
    probe_s: float  # for one product of matrices that is the same on all


@final
class Stragglers(Callback):
    """Compare on logged steps what ranks need by themselves, and name those that are slow several times in a row.

    A step takes equally long on all ranks, because they wait for each other; so what is compared is what no rank waits
    in: fetching rows, and a product of matrices. One gather of a few numbers per logged step.
    """

    def __init__(self) -> None:
        self._ended_at: float | None = None
        self._fetched_s: list[float] = []
        self._counts: dict[tuple[int, str], int] = {}
        self._probe: torch.Tensor | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The rows are there."""
        if self._ended_at is not None:
            self._fetched_s.append(time.monotonic() - self._ended_at)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare on logged steps."""
        ranks = cast(RunStrategy, trainer.strategy).ranks
        if getattr(pl_module, "metrics", {}) and ranks.size > 1:
            own = Pace(platform.node(), statistics.fmean(self._fetched_s or [0.0]), self._probed_s(pl_module.device))
            self._fetched_s.clear()
            paces: list[Pace] = ranks.gather(own)
            self._report(trainer, paces)
        self._ended_at = time.monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A validation is no fetching."""
        self._ended_at = None

    def _probed_s(self, device: torch.device) -> float:
        """Time the product; everything before it is waited for first."""
        if self._probe is None:
            width = PROBE_WIDTH[device.type]
            self._probe = torch.ones(width, width, device=device)
        torch.sum(self._probe).item()
        began_at = time.monotonic()
        torch.sum(self._probe @ self._probe).item()
        return time.monotonic() - began_at

    def _report(self, trainer: Trainer, paces: Sequence[Pace]) -> None:
        slow = slow_ranks(paces)
        self._counts = {key: self._counts.get(key, 0) + 1 for key in slow}
        for key in [key for key, count in self._counts.items() if count == REPORTS and trainer.is_global_zero]:
            rank, kind = key
            line = (
                f"slow: rank {rank} on {paces[rank].host} takes {slow[key]:.1f} x the median of all ranks {KINDS[kind]}"
                f" ({getattr(paces[rank], kind):.3g} s), at step {trainer.global_step}"
            )
            print(line, file=sys.stderr, flush=True)


def slow_ranks(paces: Sequence[Pace]) -> Mapping[tuple[int, str], float]:
    """Return the ranks that need much more than the median, by rank and kind, with the ratio.

    >>> slow_ranks([Pace("n1", 0.0, 0.01), Pace("n1", 0.0, 0.01), Pace("n2", 0.0, 0.03)])
    {(2, 'probe_s'): 3.0}
    """
    slow: dict[tuple[int, str], float] = {}
    for kind in KINDS:
        times_s = [getattr(pace, kind) for pace in paces]
        median_s = statistics.median_low(times_s)
        for rank, time_s in enumerate(times_s):
            if time_s > RATIO * median_s and time_s - median_s > LEAST_S:
                slow[rank, kind] = time_s / max(median_s, 1e-6)
    return slow
