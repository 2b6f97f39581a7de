"""Where a text ends: at a stop token, a completed stop string, or its longest length, also amid an accepted block."""

from typing import final

import torch
from torch import Tensor

from mtp_lightning.decode.settings import Settings


@final
class Stopping:
    """Cuts blocks of new tokens where their texts end."""

    def __init__(self, settings: Settings, num_rows: int, device: torch.device) -> None:
        self.settings = settings
        self.emitted = torch.zeros(num_rows, dtype=torch.long, device=device)  # (B,) new tokens so far
        self.stop_tokens = torch.tensor(list(settings.stop_tokens), dtype=torch.long, device=device)
        self.longest_string = max(map(len, settings.stop_strings), default=0)
        self.tails = [b""] * num_rows

    def cut(self, block: Tensor, num_new: Tensor, is_finished: Tensor) -> tuple[Tensor, Tensor]:
        """Say how many tokens of a block belong to each text, and which texts end with it.

        Args:
            block: (B, T) new tokens.
            num_new: (B,) how many of them were decoded.
            is_finished: (B,) texts that ended before.
        """
        remaining = self.settings.max_new_tokens - self.emitted
        kept = torch.where(is_finished, 0, torch.minimum(num_new, remaining))
        ends = is_finished
        if len(self.stop_tokens):
            places = torch.arange(block.shape[1], device=block.device)
            is_stop = torch.isin(block, self.stop_tokens) & (places < kept[:, None])
            has_stop, first = is_stop.max(1)
            kept, ends = torch.where(has_stop, first + 1, kept), ends | has_stop
        if self.longest_string:
            kept, completes = self._cut_at_strings(block, kept)
            ends = ends | completes
        self.emitted = self.emitted + kept
        return kept, ends | (self.emitted >= self.settings.max_new_tokens)

    def _cut_at_strings(self, block: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Spell the rows on the host, token by token; only texts that may end at a string pay for this."""
        detokenize = self.settings.detokenize
        assert detokenize is not None
        counts = kept.tolist()
        completes = [False] * len(counts)
        for row, tokens in enumerate(block.tolist()):
            for place, token in enumerate(tokens[: counts[row]]):
                spelled = detokenize([token])
                text = self.tails[row] + spelled
                self.tails[row] = text[max(0, len(text) - self.longest_string + 1) :]
                if any(string in text for string in self.settings.stop_strings):
                    counts[row], completes[row] = place + 1, True
                    break
        return torch.tensor(counts, device=kept.device), torch.tensor(completes, device=kept.device)
