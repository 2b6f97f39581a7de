"""AdamW, Muon and AdamW, or Adafactor, in groups by role; clipping."""

import itertools
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mtp_lightning.errors import TrainingError
from mtp_lightning.model.hidden_matrices import hidden_matrices
from mtp_lightning.model.roles import ROLES, role_of
from mtp_lightning.model.width_scaling import rate_factors
from mtp_lightning.recipe.schema.root import OptimizerSection
from mtp_lightning.training.step.muon import MuonWithAdamW
from mtp_lightning.training.strategies.param_shards import RunsOf, whole_shape


def parameter_groups(model: nn.Module, section: OptimizerSection, muon: Collection[str] = ()) -> list[dict[str, Any]]:
    """Group trainable parameters by role, whether they decay, optimizer and rate; groups without are left out.

    Args:
        model: its trainable parameters are grouped.
        section: of the recipe.
        muon: names of the parameters that Muon steps.
    """
    factors = rate_factors(model, section)
    kinds = itertools.product(ROLES, (True, False), (False, True), sorted({1.0, *factors.values()}))
    groups: dict[tuple[str, bool, bool, float], list[Tensor]] = {kind: [] for kind in kinds}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays, factor = len(whole_shape(parameter)) > 1, factors.get(name, 1.0)
            groups[role_of(name), decays, name in muon, factor].append(parameter)
    return [
        {"params": params, "role": role, "weight_decay": _weight_decay(section, role) if decays else 0.0}
        | ({"is_muon": is_muon} if muon else {})
        | ({"rate_factor": factor} if factors else {})
        for (role, decays, is_muon, factor), params in groups.items()
        if params
    ]


def _weight_decay(section: OptimizerSection, role: str) -> float:
    return section.weight_decay * next((own for name, own in section.decay_scale.items() if name == role), 1.0)


def build_optimizer(
    model: nn.Module, section: OptimizerSection, runs_of: RunsOf | None = None
) -> torch.optim.AdamW | torch.optim.Adafactor | MuonWithAdamW:
    """Build the optimizer of the model's trainable parameters; learning rates are set before every step.

    Args:
        model: the whole model, or this rank's part of it.
        section: of the recipe.
        runs_of: what ZeRO shards matrices into; None where they are whole.

    Raises:
        TrainingError: `lr_scale` or `decay_scale` names a role without parameters to train, or Muon has no matrix.
    """
    muon = hidden_matrices(model) if section.kind == "muon" else set()
    if section.kind == "muon" and not muon:
        raise TrainingError(
            "optimizer.kind=muon needs matrices of layers to train, in the trunk or in heads",
            "none: they are frozen, or the heads have no layers",
            "Set optimizer.kind=adamw, or freeze less.",
        )
    groups = parameter_groups(model, section, muon)
    for field, scales in (("lr_scale", section.lr_scale), ("decay_scale", section.decay_scale)):
        if unused := sorted({*scales} - {group["role"] for group in groups}):
            raise TrainingError(
                f"optimizer.{field} may name roles that have parameters to train",
                f"none in {', '.join(unused)}",
                f"Remove {', '.join(f'optimizer.{field}.{role}' for role in unused)}.",
            )
    if muon:
        return MuonWithAdamW(groups, section, runs_of)
    if section.kind == "adafactor":
        assert runs_of is None, (
            "means of rows and columns are no intervals of a flattened parameter"
        )  # a rule refuses it
        own = section.adafactor
        eps = (own.eps_gradient, own.eps_weight)
        return torch.optim.Adafactor(groups, lr=section.lr, beta2_decay=own.beta2_decay, eps=eps, d=own.clip_threshold)
    beta1, beta2 = section.betas
    return torch.optim.AdamW(groups, lr=section.lr, betas=(beta1, beta2), eps=section.eps, fused=True)


def rates_by_role(section: OptimizerSection, lr: float) -> dict[str, float]:
    """Learning rate of each role, where that of a role without a factor of its own is `lr`."""
    return {role: lr * factor for role, factor in (dict.fromkeys(ROLES, 1.0) | section.lr_scale).items()}


def set_learning_rate(optimizer: torch.optim.Optimizer, section: OptimizerSection, lr: float) -> None:
    """Give every group the learning rate of its role, times its own factor by the model's width."""
    rates = rates_by_role(section, lr)
    for group in optimizer.param_groups:
        group["lr"] = rates[group["role"]] * group.get("rate_factor", 1.0)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], norm: float, max_grad_norm: float) -> None:
    """Scale all gradients down so that their norm, given, is at most `max_grad_norm`; the host does not wait."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    scale = max_grad_norm / torch.tensor(norm, device="cpu").clamp(min=max_grad_norm)
    torch._foreach_mul_(gradients, scale.to(gradients[0].dtype).item())
