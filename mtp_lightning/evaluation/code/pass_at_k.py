"""pass@k: the chance that at least one of k samples passes [Chen et al. 2021], over problems, with intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
INTERVAL = (2.5, 97.5)


@final
@dataclass(frozen=True)
class PassAtK:
    """One figure."""

    k: int
    temperature: float
    value: float
    low: float  # of the 95 % interval of a bootstrap over problems
    high: float


def estimate(num_samples: int, num_passed: int, k: int) -> float:
    """Estimate pass@k of one problem without bias: the share of all k of its n samples with one that passes.

    >>> estimate(4, 1, 1), estimate(4, 1, 2), estimate(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    failed = num_samples - num_passed
    if failed < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(failed + 1, num_samples + 1)))


def pass_at_k(passes: Sequence[Sequence[bool]], k: int, temperature: float) -> PassAtK:
    """Average over problems, each with whether its samples pass; resample the problems for an interval."""
    values = np.array([estimate(len(own), sum(own), k) for own in passes])
    low, high = np.percentile(_resampled(values), INTERVAL)
    return PassAtK(k, temperature, float(values.mean()), float(low), float(high))


def _resampled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    chosen = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    means: NDArray[np.float64] = values[chosen].mean(1)
    return means


def figures(passes: Mapping[float, Sequence[Sequence[bool]]], ks: Sequence[int]) -> list[PassAtK]:
    """Compute all figures, by temperature, of those k that there are samples for."""
    return [
        pass_at_k(own, k, temperature)
        for temperature, own in sorted(passes.items())
        for k in ks
        if k <= min(map(len, own))
    ]


def best(found: Sequence[PassAtK]) -> list[PassAtK]:
    """Pick the best temperature for each k, as papers report it [Gloeckle et al. 2024]; the lowest of equal ones."""
    return [max((one for one in found if one.k == k), key=lambda one: one.value) for k in sorted({o.k for o in found})]
