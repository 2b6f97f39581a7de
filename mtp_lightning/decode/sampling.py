"""Which tokens a model may say, and with which probability: temperature, top-k, top-p."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mtp_lightning.errors import DecodingError

COLDEST = 1e-30  # scores divided by less would not be finite


@final
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; temperature 0 takes the most likely one."""

    temperature: float = 0.0
    top_k: int | None = None  # keep the k most likely tokens
    top_p: float | None = None  # keep the fewest tokens that hold this share of the probability

    def __post_init__(self) -> None:
        for expected, found, is_kept in (
            (
                f"temperature must be 0, or a finite number from {COLDEST:g} on",
                self.temperature,
                self.temperature == 0 or COLDEST <= self.temperature < math.inf,
            ),
            ("top-k must be at least 1", self.top_k, self.top_k is None or self.top_k >= 1),
            ("top-p must lie above 0 and not above 1", self.top_p, self.top_p is None or 0 < self.top_p <= 1),
        ):
            if not is_kept:
                raise DecodingError(expected, str(found), "Give a value in that range")
        if self.is_greedy and (self.top_k is not None or self.top_p is not None):
            raise DecodingError(
                "top-k and top-p need a temperature above 0",
                f"temperature {self.temperature:g}, which takes the most likely token",
                "Give a temperature, e.g. 0.8, or leave top-k and top-p away",
            )

    @property
    def is_greedy(self) -> bool:
        """Take the most likely token?"""
        return self.temperature == 0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Turn scores into the law that tokens are drawn from: (..., V) -> (..., V), in float32 at least.

        Temperature first, then top-k, then top-p on what is left. For drafts and for what verifies them alike.
        """
        scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        probabilities = scores.softmax(-1)
        if self.top_p is None or self.top_p >= 1:
            return probabilities
        ordered, order = probabilities.sort(dim=-1, descending=True)
        is_surplus = ordered.cumsum(-1) - ordered >= self.top_p  # what comes before holds enough already
        kept = probabilities.masked_fill(torch.zeros_like(is_surplus).scatter(-1, order, is_surplus), 0)
        return kept / kept.sum(-1, keepdim=True)


def draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Draw one token by weights that need not sum to one: (..., V) -> (...)."""
    drawn = torch.multinomial(weights.reshape(-1, weights.shape[-1]), 1, generator=generator)
    return drawn.view(weights.shape[:-1])
