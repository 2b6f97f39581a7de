"""Where a text ends: at a stop token, a completed stop string, or its longest length, also amid an accepted block."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from mtp_lightning.decode.settings import Settings
from mtp_lightning.decode.text_stream import TextStream


@final
class Stopping:
    """Cuts blocks of new tokens where their texts end."""

    def __init__(self, settings: Settings, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
        self.remaining = torch.full((len(prompts),), settings.max_new_tokens, device=device)  # (B,) at most
        self.stop_tokens = torch.tensor(list(settings.stop_tokens), dtype=torch.long, device=device)
        detokenize, strings = settings.detokenize, settings.stop_strings
        self.texts = (
            [TextStream(detokenize, prompt, stop_strings=strings) for prompt in prompts]
            if strings and detokenize
            else []
        )

    def cut(self, block: Tensor, num_new: Tensor, is_finished: Tensor) -> tuple[Tensor, Tensor]:
        """Say how many tokens of a block belong to each text, and which texts end with it.

        Arguments and result as of `cut_at_tokens`, whose work this does, and that of `cut_at_strings`.
        """
        kept, ends = self.cut_at_tokens(block, num_new, is_finished)
        if not self.texts:
            return kept, ends
        kept, completes = self.cut_at_strings(block, kept)
        return kept, ends | completes

    def cut_at_tokens(self, block: Tensor, num_new: Tensor, is_finished: Tensor) -> tuple[Tensor, Tensor]:
        """Cut at stop tokens and at the longest length, on the device and in place.

        Args:
            block: (B, T) new tokens.
            num_new: (B,) how many of them were decoded.
            is_finished: (B,) texts that ended before.

        Returns:
            (B,) tokens that are part of the text, and (B,) texts that have ended.
        """
        kept = torch.where(is_finished, 0, torch.minimum(num_new, self.remaining))
        ends = is_finished
        if len(self.stop_tokens):
            places = torch.arange(block.shape[1], device=block.device)
            # in numbers: torch 2.13 compiles any() over a comparison to C++ that is none
            is_stop = (block[..., None] == self.stop_tokens).sum(-1).clamp(max=1) * (places < kept[:, None])
            has_stop, first = is_stop.max(1)
            kept, ends = torch.where(has_stop > 0, first + 1, kept), ends | (has_stop > 0)
        self.remaining -= kept
        return kept, ends | (self.remaining <= 0)

    def cut_at_strings(self, block: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Cut what is kept of blocks, (B, T) and (B,), at stop strings; say which texts end there: two (B,).

        Rows are decoded on the host, one token after the other; only texts that may end at a string pay for this.
        """
        counts = kept.tolist()
        for row, (text, tokens) in enumerate(zip(self.texts, block.tolist(), strict=True)):
            for place, token in enumerate(tokens[: counts[row]], 1):
                text.push([token])
                if text.has_stopped:
                    counts[row] = place
                    break
        completes = [text.has_stopped for text in self.texts]
        return torch.tensor(counts, device=kept.device), torch.tensor(completes, device=kept.device)
