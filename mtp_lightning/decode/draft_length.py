"""How many tokens to draft: as many as make tokens per second highest, by what has been measured in this run.

A further draft is worth its cost while the tokens that it is expected to add outweigh the time that it adds: the best
length has the highest (1 + sum of cumulative acceptances) / (time of a step). Both are running means of this run, so
the number of steps depends on the machine; greedy text does not.
"""

from typing import final

MEMORY = 0.95  # weight that a measurement keeps when another step follows
TRIALS = 2  # steps that measure every length first
EXPLORE_EVERY_STEPS = 32


@final
class AdaptiveLength:
    """Chooses the length of the next draft."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.step_s: list[float | None] = [None] * (longest + 1)
        self.num_measured = [0] * (longest + 1)
        self.reached = [1e-9] * longest  # steps that came to a position, fading
        self.kept = [0.0] * longest
        self.num_steps = 0

    def choose(self) -> int:
        """Return the length of the next draft."""
        for length in range(self.longest, -1, -1):
            if self.num_measured[length] < TRIALS:
                return length
        if self.num_steps % EXPLORE_EVERY_STEPS == 0:
            return (self.num_steps // EXPLORE_EVERY_STEPS) % (self.longest + 1)
        return max(range(self.longest + 1), key=self.tokens_per_s)

    def tokens_per_s(self, length: int) -> float:
        """Expected tokens per second of a row with that length."""
        step_s = self.step_s[length]
        assert step_s is not None
        expected, cumulative = 1.0, 1.0
        for position in range(length):
            cumulative *= self.kept[position] / self.reached[position]
            expected += cumulative
        return expected / step_s

    def observe(self, length: int, step_s: float, accepted: list[int]) -> None:
        """Take in one step: its drafts' length, its time, and the drafts kept in every row that is not finished."""
        self.num_steps += 1
        self.num_measured[length] += 1
        before = self.step_s[length]
        if before is None or self.num_measured[length] <= TRIALS:
            # The first step of a length may still allocate: take the better of the first ones.
            self.step_s[length] = step_s if before is None else min(before, step_s)
        else:
            self.step_s[length] = MEMORY * before + (1 - MEMORY) * step_s
        for position in range(length):
            reached = sum(kept >= position for kept in accepted)
            self.reached[position] = MEMORY * self.reached[position] + reached
            self.kept[position] = MEMORY * self.kept[position] + sum(kept > position for kept in accepted)
