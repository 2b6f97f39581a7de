"""AdamW in groups by role, learning rate as a pure function of the step, clipping."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mtp_lightning.errors import TrainingError
from mtp_lightning.model.roles import ROLES, role_of
from mtp_lightning.recipe.schema.root import OptimizerSection
from mtp_lightning.training.strategies.param_shards import whole_shape


def parameter_groups(model: nn.Module, section: OptimizerSection) -> list[dict[str, Any]]:
    """Group trainable parameters by role and by whether they decay; groups without parameters are left out."""
    groups: dict[tuple[str, bool], list[Tensor]] = {(role, decays): [] for role in ROLES for decays in (True, False)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[role_of(name), len(whole_shape(parameter)) > 1].append(parameter)
    return [
        {"params": params, "role": role, "weight_decay": section.weight_decay if decays else 0.0}
        for (role, decays), params in groups.items()
        if params
    ]


def build_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.AdamW:
    """Build AdamW over the model's trainable parameters; learning rates are set before every step.

    Raises:
        TrainingError: `lr_scale` names a role without parameters to train.
    """
    beta1, beta2 = section.betas
    groups = parameter_groups(model, section)
    unused = sorted(section.lr_scale.keys() - {group["role"] for group in groups})
    if unused:
        raise TrainingError(
            "optimizer.lr_scale may name roles that have parameters to train",
            f"none in {', '.join(unused)}",
            f"Remove {', '.join(f'optimizer.lr_scale.{role}' for role in unused)}.",
        )
    return torch.optim.AdamW(groups, lr=section.lr, betas=(beta1, beta2), eps=section.eps, fused=True)


def learning_rate(section: OptimizerSection, step: int, num_steps: int) -> float:
    """Learning rate of a 0-based step: linear warm-up to the peak, then cosine to min_lr_ratio x peak at the last.

    >>> section = OptimizerSection(lr=1.0, warmup_steps=2, min_lr_ratio=0.1)
    >>> [round(learning_rate(section, step, 5), 3) for step in range(5)]
    [0.5, 1.0, 0.775, 0.325, 0.1]
    """
    if step < section.warmup_steps:
        return section.lr * (step + 1) / section.warmup_steps
    done = (step + 1 - section.warmup_steps) / max(1, num_steps - section.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, done))) / 2
    return section.lr * (section.min_lr_ratio + (1 - section.min_lr_ratio) * cosine)


def rates_by_role(section: OptimizerSection, lr: float) -> dict[str, float]:
    """Learning rate of each role, where that of a role without a factor of its own is `lr`."""
    return {role: lr * factor for role, factor in (dict.fromkeys(ROLES, 1.0) | section.lr_scale).items()}


def set_learning_rate(optimizer: torch.optim.Optimizer, section: OptimizerSection, lr: float) -> None:
    """Give every group the learning rate of its role."""
    rates = rates_by_role(section, lr)
    for group in optimizer.param_groups:
        group["lr"] = rates[group["role"]]


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], norm: float, max_grad_norm: float) -> None:
    """Scale all gradients down so that their norm, given, is at most `max_grad_norm`; the host does not wait."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    scale = max_grad_norm / torch.tensor(norm, device="cpu").clamp(min=max_grad_norm)
    torch._foreach_mul_(gradients, scale.to(gradients[0].dtype).item())
