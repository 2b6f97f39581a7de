"""How far the main head has drifted from the model it started as, on the same held-out rows."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_lightning.losses.chunked import chunk_rows
from mtp_lightning.losses.targets import IGNORE, shifted_targets
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.ranks import Ranks

KEPT_ENTRIES = 64  # likeliest tokens of the reference that are kept at each position; the rest are counted together
Z_95 = 1.96


class Rows(NamedTuple):
    """Held-out rows."""

    tokens: Tensor  # (R, T+n)
    documents: Tensor  # (R, T+n)
    loss_mask: Tensor | None  # (R, T+n)


class Record(NamedTuple):
    """What the reference said about some rows; the likeliest token comes first."""

    losses: Tensor  # (R, T) of the main head; 0 where there is no target
    entries: Tensor  # (R, T, K) int32 tokens
    log_probabilities: Tensor  # (R, T, K) float32


@dataclass(frozen=True)
class Drift:
    """Differences between a model's main head and the reference's."""

    loss_change: float  # mean over rows of the difference of their mean losses, in nats
    low: float  # of its 95 % interval, rows taken as pairs
    high: float
    kl: float  # of the reference from the model, in nats, all but the kept tokens taken as one: a lower bound
    flips: float  # share of positions whose likeliest token is another

    @property
    def figures(self) -> dict[str, float]:
        """Columns of metrics.csv."""
        return {
            "drift/nll_change": self.loss_change,
            "drift/nll_change_low": self.low,
            "drift/nll_change_high": self.high,
            "drift/kl": self.kl,
            "drift/flips": self.flips,
        }

    def __str__(self) -> str:
        return (
            f"the main head's loss has changed by {self.loss_change:+.4f} nats (95 % interval {self.low:+.4f} to "
            f"{self.high:+.4f}), KL {self.kl:.4f}, {self.flips:.1%} of its likeliest tokens are others"
        )


@contextmanager
def evaluating(model: MtpModel) -> Iterator[None]:
    """Let the model compute the same each time, without dropout, inside the body."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def record(model: MtpModel, rows: Rows) -> Record:
    """Note what a model's main head says about rows, on the CPU."""
    losses, entries, kept = [], [], []
    targets = _targets(model, rows)
    for part, log_probabilities in _main_log_probabilities(model, rows):
        top = log_probabilities.topk(min(KEPT_ENTRIES, log_probabilities.shape[-1]))
        losses.append(_losses(log_probabilities, targets[:, part]).cpu())
        entries.append(top.indices.to(torch.int32).cpu())
        kept.append(top.values.float().cpu())
    return Record(torch.cat(losses, 1), torch.cat(entries, 1), torch.cat(kept, 1))


@torch.no_grad()
def drift_sums(model: MtpModel, rows: Rows, reference: Record) -> Tensor:
    """Sums over rows from which `drift_of` computes, (6,); those of several ranks and batches add up.

    Rows, sum and square sum of their changes of loss, positions, sum of their KL, and flips.
    """
    targets = _targets(model, rows)
    is_valid = targets != IGNORE
    row_sums, kl, flips = torch.zeros(len(targets), dtype=torch.float64, device=targets.device), 0.0, 0.0
    for part, log_probabilities in _main_log_probabilities(model, rows):
        own = Record(*(tensor[:, part].to(targets.device) for tensor in reference))
        valid = is_valid[:, part]
        row_sums += (_losses(log_probabilities, targets[:, part]) - own.losses).double().sum(1)
        kl += float((_kl(log_probabilities, own) * valid).sum())
        flips += float(((log_probabilities.argmax(-1) != own.entries[..., 0]) & valid).sum())
    counts = is_valid.sum(1)
    changes = row_sums[counts > 0] / counts[counts > 0]
    sums = [len(changes), float(changes.sum()), float(changes.square().sum()), float(counts.sum()), kl, flips]
    return torch.tensor(sums, dtype=torch.float64, device=targets.device)


def drift_of(sums: Tensor, ranks: Ranks) -> Drift:
    """Compute the drift from the sums of all ranks."""
    num_rows, total, squares, positions, kl, flips = ranks.sum(sums).tolist()
    mean = total / max(1, num_rows)
    variance = max(0.0, squares - num_rows * mean**2) / max(1, num_rows - 1)
    margin = Z_95 * math.sqrt(variance / max(1, num_rows))
    positions = max(1, positions)
    return Drift(mean, mean - margin, mean + margin, kl / positions, flips / positions)


def _main_log_probabilities(model: MtpModel, rows: Rows) -> Iterator[tuple[slice, Tensor]]:
    """Yield the main head's log-probabilities of some positions of all rows at a time, (R, C, V)."""
    hidden = model.hidden_states(rows.tokens, rows.documents, model.heads.path(1))[1]  # (R, T, D)
    num_rows, num_positions, _ = hidden.shape
    unembedding, vocab_size = model.unembedding, model.section.vocab_size
    together = chunk_rows(num_rows * num_positions, vocab_size, torch.float32, unembedding.chunk_bytes // 2)
    step = max(1, together // num_rows)
    for start in range(0, num_positions, step):
        part = slice(start, min(start + step, num_positions))
        logits = unembedding.logits(1, hidden[:, part])
        yield part, logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _targets(model: MtpModel, rows: Rows) -> Tensor:
    """Targets of the main head, (R, T)."""
    return shifted_targets(rows.tokens, rows.documents, model.num_offsets, rows.loss_mask)[0]


def _losses(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    picked = -log_probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return torch.where(targets != IGNORE, picked, 0)


def _kl(log_probabilities: Tensor, reference: Record) -> Tensor:
    """KL of the reference, which keeps some tokens, from a model, all other tokens taken as one: (R, C)."""
    log_q = log_probabilities.gather(-1, reference.entries.long())
    log_p = reference.log_probabilities.to(log_q.dtype)
    rest_p, rest_q = (_rest(values) for values in (log_p, log_q))
    return (log_p.exp() * (log_p - log_q)).sum(-1) + rest_p * (rest_p / rest_q).log()


def _rest(log_probabilities: Tensor) -> Tensor:
    """Probability of all tokens but the kept ones."""
    return (1 - log_probabilities.exp().sum(-1)).clamp(min=torch.finfo(log_probabilities.dtype).eps)
