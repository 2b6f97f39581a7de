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
        if not self._leaves_out(logits):
            return self._softmax(logits)
        likeliest, tokens = self._likeliest(logits)
        return likeliest.new_zeros(logits.shape).scatter(-1, tokens, likeliest)

    def draw(self, logits: Tensor, generator: "Generator") -> Tensor:
        """Draw one token of the law of `probabilities`: (..., V) -> (...)."""
        if not self._leaves_out(logits):
            return draw(self._softmax(logits), generator)
        likeliest, tokens = self._likeliest(logits)  # k of V
        return tokens.gather(-1, draw(likeliest, generator)[..., None])[..., 0]

    def _leaves_out(self, logits: Tensor) -> bool:
        return self._num_kept(logits) < logits.shape[-1] or (self.top_p or 1.0) < 1

    def _num_kept(self, logits: Tensor) -> int:
        return min(self.top_k or logits.shape[-1], logits.shape[-1])

    def _softmax(self, logits: Tensor) -> Tensor:
        return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature).softmax(-1)

    def _likeliest(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Find the tokens that top-k keeps, and what each is drawn with after top-p: (..., V) -> two (..., k)."""
        scores, tokens = logits.topk(self._num_kept(logits), dim=-1)
        probabilities = self._softmax(scores)
        if self.top_p is not None:
            is_surplus = (
                probabilities.cumsum(-1) - probabilities >= self.top_p
            )  # what comes before holds enough already
            probabilities = probabilities.masked_fill(is_surplus, 0)
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        return probabilities, tokens


@final
class DrawnNoise:
    """Random numbers of a step, drawn before it: a compiled step has no generator, but reads them where they stay.

    The first step that asks for them is recorded: it makes a buffer for each. `refill` draws for the next step, in the
    order and the shapes of the first, so that a seed gives the text that it gives without this.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.buffers: list[tuple[bool, Tensor]] = []
        self.is_recording = True
        self.num_read = 0

    def read(self, like: Tensor, *, is_uniform: bool) -> Tensor:
        """Give the next numbers of the step: between 0 and 1, or exponential."""
        if self.is_recording:
            self.buffers.append((is_uniform, _filled(torch.empty_like(like), self.generator, is_uniform=is_uniform)))
        self.num_read += 1
        return self.buffers[self.num_read - 1][1]

    def refill(self) -> None:
        """Draw for the next step."""
        self.is_recording, self.num_read = False, 0
        for is_uniform, buffer in self.buffers:
            _filled(buffer, self.generator, is_uniform=is_uniform)


Generator = torch.Generator | DrawnNoise
"""What chance comes from."""


def _filled(empty: Tensor, generator: torch.Generator, *, is_uniform: bool) -> Tensor:
    return empty.uniform_(generator=generator) if is_uniform else empty.exponential_(1, generator=generator)


def uniform(like: Tensor, generator: Generator) -> Tensor:
    """Draw numbers from 0 to below 1, as many as there are."""
    if isinstance(generator, DrawnNoise):
        return generator.read(like, is_uniform=True)
    return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def draw(weights: Tensor, generator: Generator) -> Tensor:
    """Draw one token by weights that need not sum to one: (..., V) -> (...)."""
    if weights.is_cuda or isinstance(generator, DrawnNoise):
        return race(weights, generator)
    drawn = torch.multinomial(weights.reshape(-1, weights.shape[-1]), 1, generator=generator)
    return drawn.view(weights.shape[:-1])


def race(weights: Tensor, generator: Generator) -> Tensor:
    """Draw as `torch.multinomial` does, the same tokens, without its checks: (..., V) -> (...).

    The first of independent exponential clocks with the weights as their rates. On a GPU the host would wait for the
    checks twice.
    """
    if isinstance(generator, DrawnNoise):
        return (weights / generator.read(weights, is_uniform=False)).argmax(-1)
    clocks = torch.empty_like(weights).exponential_(1, generator=generator)
    return (weights / clocks).argmax(-1)
