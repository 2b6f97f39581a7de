"""The one reduction before the backward passes of a step: counts of the global batch, and votes to stop and to save.

Every step needs the counts of all ranks before its first loss. Ranks that were sent a stop signal must agree on the
step after which all of them stop, and the step that is saved because the first rank's clock says so; the votes ride
along in the same all-reduce, so that they cost none of their own:

    this rank    [ targets 1..N | teachers 1..N | ordered | 1 at its stop level, 0 at the others | 1 to save ]
                                        all-reduce (sum)
    all ranks    [ targets 1..N | teachers 1..N | ordered | number of ranks at each stop level   | to save   ]
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from mtp_lightning.ranks import Ranks
from mtp_lightning.training.step.batch import BatchCounts, filled

NUM_STOP_LEVELS = 3  # go on; stop; stop and be requeued


class StepVote:
    """Each rank's wish to stop or to save, and what follows from the wishes of all.

    Attributes:
        own_level: asked once per reduction, on every rank.
        own_save_due: likewise; true where this rank wants the step to be saved.
        agreed_level: the highest of all ranks as of the last reduction; the same on all of them.
        save_due: whether some rank wanted to save, as of the last reduction; the same on all of them.
    """

    size = NUM_STOP_LEVELS + 1

    def __init__(self) -> None:
        self.own_level: Callable[[], int] = int  # 0; a module can be pickled
        self.own_save_due: Callable[[], bool] = bool
        self.agreed_level = 0
        self.save_due = False

    def ballot(self) -> list[int]:
        """Return 1 at this rank's level, 0 at the others, and 1 if it wants to save."""
        own = self.own_level()
        return [*(int(level == own) for level in range(NUM_STOP_LEVELS)), int(self.own_save_due())]

    def count(self, ballots: list[int]) -> None:
        """Take the sum of all ranks' ballots."""
        *levels, savers = ballots
        self.agreed_level = max(level for level, voters in enumerate(levels) if voters)
        self.save_due = savers > 0


class AgreedCounts(NamedTuple):
    """Counts of the global batch, the same on all ranks."""

    on_device: BatchCounts
    targets: list[int]  # valid targets of each offset, on the host


def agree_on_step(own: BatchCounts, vote: StepVote, ranks: Ranks) -> AgreedCounts:
    """Sum the counts of all ranks and count their votes: one all-reduce, one host wait."""
    n = len(own.targets)
    ballot = filled(vote.ballot(), own.targets)
    total = ranks.sum(torch.cat((own.targets, own.teachers, own.ordered[None], ballot)))
    on_host = total.tolist()
    vote.count(on_host[-vote.size :])
    return AgreedCounts(BatchCounts(targets=total[:n], teachers=total[n : 2 * n], ordered=total[2 * n]), on_host[:n])
