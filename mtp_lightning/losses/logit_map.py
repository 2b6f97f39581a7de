"""What some models do to the scores of their unembedding [Gemma 2, Cohere, Granite]."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitMap:
    """Scores times `scale`, then `cap` x tanh(scores / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, scores: Tensor) -> Tensor:
        """Map scores, (..., V)."""
        if self.scale != 1:
            scores = scores * self.scale
        return scores if self.cap is None else self.cap * torch.tanh(scores / self.cap)

    def slope_at(self, mapped: Tensor) -> Tensor | float:
        """Derivative of the map where it gave these scores, (..., V)."""
        return self.scale if self.cap is None else self.scale * (1 - (mapped / self.cap).square())
