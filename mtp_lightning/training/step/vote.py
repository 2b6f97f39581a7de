"""The one reduction before the backward passes of a step: the counts of the global batch, and the vote to stop.

Every step needs the counts of all ranks before its first loss. Ranks that were sent a stop signal must agree on the
step after which all of them stop; their vote rides along in the same all-reduce, so that it costs none of its own:

    this rank    [ targets 1..N | teachers 1..N | ordered | 1 at its stop level, 0 at the others ]
                                        all-reduce (sum)
    all ranks    [ targets 1..N | teachers 1..N | ordered | number of ranks at each stop level   ]
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from mtp_lightning.ranks import Ranks
from mtp_lightning.training.step.batch import BatchCounts

NUM_STOP_LEVELS = 3  # go on; stop; stop and be requeued


class StopVote:
    """Each rank's wish to stop, and the highest level that any rank has voted for.

    Attributes:
        own_level: asked once per reduction, on every rank.
        agreed_level: the highest of all ranks as of the last reduction; the same on all of them.
    """

    def __init__(self) -> None:
        self.own_level: Callable[[], int] = lambda: 0
        self.agreed_level = 0

    def ballot(self) -> list[int]:
        """Return 1 at this rank's level, 0 at the others."""
        own = self.own_level()
        return [int(level == own) for level in range(NUM_STOP_LEVELS)]

    def count(self, ballots: list[int]) -> None:
        """Take the sum of all ranks' ballots."""
        self.agreed_level = max(level for level, voters in enumerate(ballots) if voters)


class AgreedCounts(NamedTuple):
    """Counts of the global batch, the same on all ranks."""

    on_device: BatchCounts
    targets: list[int]  # valid targets of each offset, on the host


def agree_on_step(own: BatchCounts, vote: StopVote, ranks: Ranks) -> AgreedCounts:
    """Sum the counts of all ranks and count their votes: one all-reduce, one host wait."""
    n = len(own.targets)
    ballot = own.targets.new_tensor(vote.ballot())
    total = ranks.sum(torch.cat((own.targets, own.teachers, own.ordered[None], ballot)))
    on_host = total.tolist()
    vote.count(on_host[-NUM_STOP_LEVELS:])
    return AgreedCounts(BatchCounts(targets=total[:n], teachers=total[n : 2 * n], ordered=total[2 * n]), on_host[:n])
