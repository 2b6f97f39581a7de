"""Which drafts are kept, and which token follows them. Each rule sees a chain of K drafts and the main head's scores.

The scores (B, K+1, V) are those of the committed token and of every draft after it; score i judges draft i+1. All
rules take the longest run of drafts that pass; the token after it comes from the main head.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mtp_lightning.decode.sampling import Generator, Sampling, draw, uniform


class AcceptResult(NamedTuple):
    """Outcome of a verification."""

    accepted: Tensor  # (B,) drafts kept
    block: Tensor  # (B, K+1) kept drafts, then the token that follows; the rest means nothing


def accept_greedy(logits: Tensor, drafts: Tensor) -> AcceptResult:
    """Keep drafts that are the main head's first choice [Stern 2018]: the text is that of plain greedy decoding."""
    choices = logits.argmax(-1)  # (B, K+1); what follows a kept draft is the next choice, so they are the block
    return AcceptResult(_leading(drafts == choices[:, :-1]), choices)


def accept_point_mass(logits: Tensor, drafts: Tensor, sampling: Sampling, generator: Generator) -> AcceptResult:
    """Keep draft x with probability p(x); where one fails, draw from p without x, renormalised.

    The text has the law of plain sampling: x comes out with probability p(x), any other y with
    (1 - p(x)) p(y) / (1 - p(x)). Holds for any drafts that were not drawn at random.
    """
    if not drafts.shape[1]:
        return AcceptResult(
            torch.zeros(len(drafts), dtype=torch.long, device=drafts.device), sampling.draw(logits, generator)
        )
    probs = sampling.probabilities(logits)  # (B, K+1, V)
    chance = probs[:, :-1].gather(2, drafts[:, :, None])[:, :, 0]  # (B, K)
    accepted = _leading(uniform(chance, generator) < chance)
    rest = _at(probs, accepted)  # (B, V)
    failed = drafts.gather(1, accepted.clamp(max=drafts.shape[1] - 1)[:, None])  # (B, 1)
    is_failed = (accepted < drafts.shape[1])[:, None]
    rest = rest.scatter(1, failed, torch.where(is_failed, 0, rest.gather(1, failed)))
    return _accept_result(accepted, drafts, draw(rest, generator))


def rejection_sample(
    logits: Tensor, drafts: Tensor, drafted_from: Tensor, sampling: Sampling, generator: Generator
) -> AcceptResult:
    """Keep draft x, drawn from q, with probability min(1, p(x)/q(x)); else draw from max(p - q, 0), renormalised.

    The text has the law of plain sampling [Leviathan 2023; Chen 2023].

    Args:
        logits: (B, K+1, V) scores of the main head.
        drafts: (B, K) tokens.
        drafted_from: (B, K, V) the probabilities q that each was drawn by.
        sampling: What was applied to the heads' scores to make q, and is applied to the main head's.
        generator: Source of chance.
    """
    probs = sampling.probabilities(logits)  # (B, K+1, V)
    mine, theirs = (x[:, : drafts.shape[1]].gather(2, drafts[:, :, None])[:, :, 0] for x in (probs, drafted_from))
    accepted = _leading(uniform(mine, generator) * theirs < mine)
    q = torch.nn.functional.pad(drafted_from, (0, 0, 0, 1))  # (B, K+1, V); nothing is drafted after the last
    left = (_at(probs, accepted) - _at(q, accepted)).clamp(min=0)  # (B, V)
    # Where p = q up to rounding, nothing is left, and a draft that failed by rounding may as well come from p.
    is_empty = left.sum(-1, keepdim=True) <= 0
    return _accept_result(accepted, drafts, draw(torch.where(is_empty, _at(probs, accepted), left), generator))


def accept_typical(
    logits: Tensor, drafts: Tensor, sampling: Sampling, generator: Generator, *, epsilon: float, delta: float
) -> AcceptResult:
    """Keep draft x if p(x) > min(epsilon, delta exp(-H(p))) [Medusa]. LOSSY: the text does not have the model's law."""
    probs = sampling.probabilities(logits)  # (B, K+1, V)
    judging = probs[:, :-1]
    entropy = -torch.special.xlogy(judging, judging).sum(-1)  # (B, K)
    chance = judging.gather(2, drafts[:, :, None])[:, :, 0]
    accepted = _leading(chance > (delta * (-entropy).exp()).clamp(max=epsilon))
    return _accept_result(accepted, drafts, draw(_at(probs, accepted), generator))


def _leading(passes: Tensor) -> Tensor:
    """Count the trues before the first false: (B, K) -> (B,)."""
    return passes.cumprod(1).sum(1)


def _at(values: Tensor, index: Tensor) -> Tensor:
    """Pick one entry of the second axis in every row: (B, K, V), (B,) -> (B, V)."""
    return values[torch.arange(len(values), device=values.device), index]


def _accept_result(accepted: Tensor, drafts: Tensor, following: Tensor) -> AcceptResult:
    block = torch.nn.functional.pad(drafts, (0, 1)).scatter(1, accepted[:, None], following[:, None])
    return AcceptResult(accepted, block)
