"""Losses per row of logits with their gradients, computed on chunks of rows.

A row loss turns a chunk of logits, in place, into its gradient up to one factor per row. Leaving that factor to the
matrix products that follow saves a pass over the (C, V) chunk, which is what the loss spends its time on.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from mtp_lightning.losses.targets import IGNORE


class RowLoss(ABC):
    """A loss per row of a (P, V) matrix that is only ever seen in chunks of rows."""

    @abstractmethod
    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Compute the losses of a chunk's rows and turn its logits into their gradient, divided by the returned factor.

        Args:
            logits: (C, V) in float32 or float64; overwritten.
            rows: Which of the P rows these are.

        Returns:
            Losses (C,) and factors (C,); gradient = factor x what `logits` now holds. Both 0 for ignored rows.
        """


class CrossEntropy(RowLoss):
    """Cross-entropy with optional label smoothing and z-loss; keeps the plain negative log-likelihood too."""

    def __init__(
        self, targets: Tensor, *, smoothing: float, z_loss: float, predicts: bool, learns: Tensor | None = None
    ) -> None:
        self.targets = targets  # (P,)
        self.learns = learns  # (P,) rows that have a loss and a gradient, None for all; others are measured alone
        self.smoothing = smoothing
        self.z_loss = z_loss
        self.nll_sum: Tensor | float = 0.0
        self.predictions = torch.empty_like(targets) if predicts else None  # (P,)

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Compute a chunk; see `RowLoss`."""
        targets = self.targets[rows]
        is_valid = targets != IGNORE
        index = targets.clamp(min=0)[:, None]  # (C, 1)
        picked = logits.gather(1, index)[:, 0]
        mean = logits.mean(1) if self.smoothing else None
        peak = self._peak(logits, rows)
        mass = logits.sub_(peak[:, None]).exp_().sum(1)
        log_mass = peak + mass.log()
        nll = log_mass - picked
        self.nll_sum = self.nll_sum + torch.where(is_valid, nll, 0).sum()
        if self.learns is not None:
            is_valid = is_valid & self.learns[rows]
        losses = nll
        if self.z_loss:
            losses = losses + self.z_loss * log_mass.square()
            logits.mul_((1 + 2 * self.z_loss * log_mass)[:, None])
        if mean is not None:
            losses = losses + self.smoothing * (picked - mean)
            logits.sub_((mass * self.smoothing / logits.shape[1])[:, None])
        logits.scatter_add_(1, index, (self.smoothing - 1) * mass[:, None])
        return torch.where(is_valid, losses, 0), is_valid / mass

    def _peak(self, logits: Tensor, rows: slice) -> Tensor:
        if self.predictions is None:
            return logits.amax(1)
        peak, self.predictions[rows] = logits.max(1)
        return peak


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

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
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
        return torch.where(is_valid, losses, 0), is_valid.to(logits.dtype)
