"""Mean and interval of a few values, such as those of several seeds."""

import math
from collections.abc import Sequence
from typing import NamedTuple

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; from 10 on the last one is used, which is
# too wide rather than too narrow.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Spread(NamedTuple):
    """Mean over seeds, and half the width of its 95 % interval; None with a single seed."""

    mean: float
    margin: float | None


def spread(values: Sequence[float]) -> Spread:
    """Mean of some values and half the width of its 95 % interval, by Student's t.

    >>> spread([1.0, 2.0, 3.0])
    Spread(mean=2.0, margin=2.48433820832296)
    """
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return Spread(mean, None)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return Spread(mean, T_95[min(count - 1, len(T_95)) - 1] * deviation / math.sqrt(count))
