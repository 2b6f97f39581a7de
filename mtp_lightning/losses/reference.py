"""The losses as defined, on full logits. Slow and hungry; the oracle of everything in `chunked.py`."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.losses.targets import IGNORE
from mtp_lightning.recipe.schema.objective import DistillSection


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float, z_loss: float) -> Tensor:
    """Loss of each row: (P, V) logits, (P,) targets -> (P,); 0 where the target is `IGNORE`."""
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE, label_smoothing=smoothing, reduction="none")
    if z_loss:
        losses = losses + z_loss * logits.logsumexp(1).square() * (targets != IGNORE)
    return losses


def token_order(logits: Tensor, tokens: Tensor, documents: Tensor, window: int) -> Tensor:
    """Token-order loss of each position [arXiv 2508.19228]: (B, T, V), (B, T+n), (B, T+n) -> (B, T).

    The score of token v is `window` minus the distance to its nearest future occurrence (0 for the next token)
    and minus infinity for tokens that do not occur; the target is the softmax of the scores. Positions with no
    future token in their document and window have loss 0.
    """
    scores = torch.full_like(logits, -torch.inf)
    places = torch.arange(logits.shape[1], device=logits.device)
    for distance in reversed(range(window)):  # the nearest last, over what is further away
        there = places + 1 + distance
        clamped = there.clamp(max=tokens.shape[1] - 1)
        is_future = (there < tokens.shape[1]) & (documents[:, clamped] == documents[:, places])
        own = tokens[:, clamped, None]
        scores.scatter_(2, own, torch.where(is_future[..., None], window - distance, scores.gather(2, own)))
    has_future = torch.isfinite(scores).any(2)
    targets = torch.where(has_future[..., None], scores, 0).softmax(2)
    return -(targets * logits.log_softmax(2)).sum(2) * has_future


def distillation(teacher: Tensor, student: Tensor, section: DistillSection) -> Tensor:
    """Divergence of each row's student from its teacher: two (P, V) logits -> (P,); 0 where it is not confident."""
    kept = teacher.topk(section.resolved_top_k(teacher.shape[1])).indices
    p, q = ((logits.gather(1, kept) / section.temperature).softmax(1) for logits in (teacher, student))
    overlap = torch.minimum(p, q).sum(1)
    share = (-section.lk_rate * overlap.detach()).exp()
    losses = {
        "forward_kl": F.kl_div(q.log(), p, reduction="none").sum(1),
        "reverse_kl": F.kl_div(p.log(), q, reduction="none").sum(1),
        "jsd": sum(F.kl_div(((p + q) / 2).log(), side, reduction="none").sum(1) / 2 for side in (p, q)),
        "tv": (p - q).abs().sum(1) / 2,
        "lk_alpha": -overlap.log(),
    }
    losses["lk_lambda"] = share * losses["forward_kl"] + (1 - share) * losses["tv"]
    is_counted = p.amax(1) >= (section.confidence if section.where == "confident" else 0)
    return torch.where(is_counted, losses[section.divergence], 0)
