"""What drafting achieved, in vLLM's counters and the figures made from them.

A step is one verifying forward of one row; the token that a prompt's own forward yields belongs to none. A step that
keeps a drafts yields a + 1 tokens. Before texts are cut at their ends, emitted = prompts + sum of (a + 1).
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import final


@final
@dataclass
class Statistics:
    """Counters of one generation."""

    accepted_by_row: list[list[int]] = field(default_factory=list)  # drafts kept in every step of every row
    drafted_by_step: list[int] = field(default_factory=list)  # longest path of drafts offered in every step
    num_prompts: int = 0
    num_emitted_tokens: int = 0  # new tokens, those of the prompts' own forwards included
    num_cut_tokens: int = 0  # decoded behind the end of a text
    num_draft_tokens: int = 0  # tokens fed to be verified; in a tree, all its nodes

    @property
    def num_drafts(self) -> int:
        """Steps, over all rows."""
        return sum(map(len, self.accepted_by_row))

    @property
    def num_accepted_tokens(self) -> int:
        """Drafts kept."""
        return sum(map(sum, self.accepted_by_row))

    @property
    def num_accepted_tokens_per_pos(self) -> list[int]:
        """Steps that kept the first, the second, ... draft."""
        histogram, positions = self.histogram, range(1, 1 + max(self.drafted_by_step, default=0))
        return [sum(count for kept, count in histogram.items() if kept >= position) for position in positions]

    @property
    def histogram(self) -> dict[int, int]:
        """Steps by number of drafts kept."""
        counts = Counter(kept for row in self.accepted_by_row for kept in row)
        return dict(sorted(counts.items()))

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per step: 1 + accepted / steps."""
        return 1 + self.num_accepted_tokens / self.num_drafts if self.num_drafts else 1.0

    @property
    def acceptance_rate_per_position(self) -> list[float]:
        """Share of steps that kept the first, the second, ... draft."""
        return [kept / self.num_drafts for kept in self.num_accepted_tokens_per_pos] if self.num_drafts else []

    @property
    def conditional_acceptance_rate(self) -> list[float]:
        """Share of steps that kept a draft among those that kept all before it; NaN where none did."""
        kept = [self.num_drafts, *self.num_accepted_tokens_per_pos]
        return [now / before if before else float("nan") for before, now in pairwise(kept)]

    @property
    def is_consistent(self) -> bool:
        """Tell whether emitted tokens are what the steps account for."""
        decoded = self.num_prompts + self.num_accepted_tokens + self.num_drafts
        return self.num_emitted_tokens + self.num_cut_tokens == decoded
