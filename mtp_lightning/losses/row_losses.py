"""Losses per row of logits with their gradients, computed on chunks of rows.

A row loss makes of a chunk of logits its gradient up to one factor per row, in the memory of the logits. Leaving that
factor to the matrix products that follow saves a pass over the (C, V) chunk, which is what the loss spends its time on.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mtp_lightning.losses.targets import IGNORE

LossKernel = Literal["own", "liger"]


class RowLoss(ABC):
    """A loss per row of a (P, V) matrix that is only ever seen in chunks of rows."""

    @abstractmethod
    def __call__(self, logits: Tensor, rows: slice, dtype: torch.dtype) -> "RowLosses":
        """Compute the losses of a chunk's rows and make of its logits their gradient, divided by a factor per row.

        Args:
            logits: (C, V) in float32 or float64; no longer what they were afterwards.
            rows: Which of the P rows these are.
            dtype: Type that the gradient will be rounded to next: it may come in it already.

        Returns:
            Losses, factors, and the gradient before they are multiplied.
        """


class RowLosses(NamedTuple):
    """What a row loss makes of a chunk."""

    losses: Tensor  # (C,) 0 for ignored rows
    factors: Tensor  # (C,) 0 for ignored rows
    gradient: Tensor  # (C, V), divided by the factor of its row; the logits' own memory, unless in another type


class CrossEntropy(RowLoss):
    """Cross-entropy with optional label smoothing and z-loss; keeps the plain negative log-likelihood too."""

    def __init__(
        self,
        targets: Tensor,
        *,
        smoothing: float,
        z_loss: float,
        predicts: bool,
        learns: Tensor | None = None,
        compiles: bool = False,
        kernel: LossKernel = "own",
    ) -> None:
        self.targets = targets  # (P,)
        self.learns = learns  # (P,) rows that have a loss and a gradient, None for all; others are measured alone
        self.smoothing = smoothing
        self.z_loss = z_loss
        self.nll_sum: Tensor | float = 0.0
        self.predictions = torch.empty_like(targets) if predicts else None  # (P,)
        self.rule = _compiled_rule() if compiles else _in_place
        self.kernel = kernel  # what runs it: this rule, chunk by chunk, or one fused with the products

    def __call__(self, logits: Tensor, rows: slice, dtype: torch.dtype) -> RowLosses:
        """Compute a chunk; see `RowLoss`."""
        targets = self.targets[rows]
        is_valid = targets != IGNORE
        chunk = self.rule(
            logits,
            targets.clamp(min=0)[:, None],
            smoothing=self.smoothing,
            z_loss=self.z_loss,
            predicts=self.predictions is not None,
            dtype=dtype,
        )
        self.nll_sum = self.nll_sum + torch.where(is_valid, chunk.nll, 0).sum()
        if self.predictions is not None and chunk.predictions is not None:
            self.predictions[rows] = chunk.predictions
        if self.learns is not None:
            is_valid = is_valid & self.learns[rows]
        return RowLosses(torch.where(is_valid, chunk.losses, 0), is_valid / chunk.mass, chunk.gradient)


class _Chunk(NamedTuple):
    nll: Tensor  # (C,)
    losses: Tensor  # (C,) with smoothing and z-loss
    mass: Tensor  # (C,) sum of exp(logit - largest), by which the gradient is yet to be divided
    gradient: Tensor  # (C, V)
    predictions: Tensor | None  # (C,)


def _in_place(
    logits: Tensor, index: Tensor, *, smoothing: float, z_loss: float, predicts: bool, dtype: torch.dtype
) -> _Chunk:
    """Compute cross-entropies of a chunk in its own memory, a pass for each operation; `dtype` is not needed."""
    picked = logits.gather(1, index)[:, 0]
    mean = logits.mean(1) if smoothing else None
    peak, predictions = logits.max(1) if predicts else (logits.amax(1), None)
    mass = logits.sub_(peak[:, None]).exp_().sum(1)
    log_mass = peak + mass.log()
    nll = losses = log_mass - picked
    if z_loss:
        losses = losses + z_loss * log_mass.square()
        logits.mul_((1 + 2 * z_loss * log_mass)[:, None])
    if mean is not None:
        losses = losses + smoothing * (picked - mean)
        logits.sub_((mass * smoothing / logits.shape[1])[:, None])
    logits.scatter_add_(1, index, (smoothing - 1) * mass[:, None])
    return _Chunk(nll, losses, mass, logits, predictions)


def _to_be_compiled(
    logits: Tensor, index: Tensor, *, smoothing: float, z_loss: float, predicts: bool, dtype: torch.dtype
) -> _Chunk:
    """Compute the same so that a compiler needs few passes: two or three that read, one that writes the gradient."""
    picked = logits.gather(1, index)[:, 0]
    peak, predictions = logits.max(1) if predicts else (logits.amax(1), None)
    weights = (logits - peak[:, None]).exp()
    mass = weights.sum(1)
    log_mass = peak + mass.log()
    nll = losses = log_mass - picked
    if z_loss:
        losses = losses + z_loss * log_mass.square()
        weights = weights * (1 + 2 * z_loss * log_mass)[:, None]
    if smoothing:
        losses = losses + smoothing * (picked - logits.mean(1))
        weights = weights - (mass * smoothing / logits.shape[1])[:, None]
    is_target = torch.arange(logits.shape[1], device=logits.device) == index
    gradient = weights - torch.where(is_target, (1 - smoothing) * mass[:, None], 0)
    gradient = logits.copy_(gradient) if dtype == logits.dtype else gradient.to(dtype)
    return _Chunk(nll, losses, mass, gradient, predictions)


@cache
def _compiled_rule() -> Callable[..., _Chunk]:
    return torch.compile(_to_be_compiled)


class TokenOrder(RowLoss):
    """Token-order prediction: a softmax over how soon each token comes next [arXiv 2508.19228]."""

    def __init__(self, tokens: Tensor, documents: Tensor, num_offsets: int, window: int) -> None:
        """Prepare the tokens ahead of every position.

        Args:
            tokens: (B, T+n) token ids.
            documents: (B, T+n) document numbers; tokens of another document do not count.
            num_offsets: Number n of tokens after the last position.
            window: How many tokens ahead are scored. Beyond the row's end there are none.
        """
        self.num_positions = tokens.shape[1] - num_offsets
        self.window = min(window, tokens.shape[1] - 1)
        self.tokens = torch.nn.functional.pad(tokens, (0, self.window))
        self.documents = torch.nn.functional.pad(documents, (0, self.window), value=-1)

    def __call__(self, logits: Tensor, rows: slice, dtype: torch.dtype) -> RowLosses:
        """Compute a chunk; see `RowLoss`."""
        index = torch.arange(rows.start, rows.start + len(logits), device=logits.device)
        batch, here = index[:, None] // self.num_positions, index[:, None] % self.num_positions  # (C, 1)
        distance = torch.arange(self.window, device=logits.device)
        ahead = self.tokens[batch, here + 1 + distance]  # (C, window)
        is_ahead = self.documents[batch, here + 1 + distance] == self.documents[batch, here]
        nearness = torch.exp(-distance.to(logits.dtype))
        wanted = torch.zeros_like(logits)  # (C, V)
        wanted.scatter_reduce_(1, ahead, nearness * is_ahead, reduce="amax")
        wanted /= wanted.sum(1, keepdim=True).clamp(min=torch.finfo(logits.dtype).tiny)
        is_valid = is_ahead.any(1)
        log_mass = logits.logsumexp(1)
        losses = log_mass - (wanted * logits).sum(1)
        logits.sub_(log_mass[:, None]).exp_().sub_(wanted)
        return RowLosses(torch.where(is_valid, losses, 0), is_valid.to(logits.dtype), logits)
