"""How far a student's distribution is from its teacher's, with the gradient written out.

Each divergence takes log-probabilities of the same K entries, teacher (C, K) and student (C, K), and returns the loss
of each row, (C,), and its gradient with respect to the student's logits, (C, K). The gradient with respect to the
teacher's logits is that of the mirrored divergence with the two sides exchanged; `DIVERGENCES` names both.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

ROUNDING = 64  # relative difference of equal probabilities, in units of the last place
Divergence = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """KL of the teacher from the student."""
    p, q = teacher.exp(), student.exp()
    return (p * (teacher - student)).sum(1), q - p


def reverse_kl(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """KL of the student from the teacher."""
    q, excess = student.exp(), student - teacher
    losses = (q * excess).sum(1)
    return losses, q * (excess - losses[:, None])


def jensen_shannon(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Mean KL of both sides from their mean."""
    p, q = teacher.exp(), student.exp()
    middle = torch.logaddexp(teacher, student) - math.log(2)
    excess = student - middle
    of_student = (q * excess).sum(1)
    losses = ((p * (teacher - middle)).sum(1) + of_student) / 2
    return losses, q * (excess - of_student[:, None]) / 2


def total_variation(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """One minus the overlap, which is the probability that speculative sampling accepts the student's token."""
    q = student.exp()
    difference = q - teacher.exp()
    is_rounding = difference.abs() <= ROUNDING * torch.finfo(q.dtype).eps * q  # its sign would be a full-sized slope
    sign = difference.sign().masked_fill(is_rounding, 0)
    return difference.abs().sum(1) / 2, q * (sign - (q * sign).sum(1, keepdim=True)) / 2


def negative_log_overlap(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Minus the logarithm of the overlap, LK-alpha."""
    overlap = _overlap(teacher, student)
    _, slope = total_variation(teacher, student)
    return -overlap.log(), slope / overlap[:, None]


def mixed(teacher: Tensor, student: Tensor, *, kl: Divergence, rate: float) -> tuple[Tensor, Tensor]:
    """KL while the sides are far apart, total variation as they meet, LK-lambda; the share has no gradient."""
    share = (-rate * _overlap(teacher, student)).exp()
    (kl_losses, kl_slope), (losses, slope) = kl(teacher, student), total_variation(teacher, student)
    return torch.lerp(losses, kl_losses, share), torch.lerp(slope, kl_slope, share[:, None])


def _overlap(teacher: Tensor, student: Tensor) -> Tensor:
    overlap = torch.minimum(teacher, student).exp().sum(1)
    return overlap.clamp(min=torch.finfo(overlap.dtype).tiny)


def divergence_pair(name: str, lk_rate: float) -> tuple[Divergence, Divergence]:
    """Return a recipe's divergence, and the mirrored one."""
    if name == "lk_lambda":
        return partial(mixed, kl=forward_kl, rate=lk_rate), partial(mixed, kl=reverse_kl, rate=lk_rate)
    return DIVERGENCES[name]


DIVERGENCES: dict[str, tuple[Divergence, Divergence]] = {
    "forward_kl": (forward_kl, reverse_kl),
    "reverse_kl": (reverse_kl, forward_kl),
    "jsd": (jensen_shannon, jensen_shannon),
    "tv": (total_variation, total_variation),
    "lk_alpha": (negative_log_overlap, negative_log_overlap),
}
