"""Muon for hidden matrices and AdamW for everything else, as one optimizer.

Muon needs a whole matrix, and under ZeRO a rank holds a run of its entries. DeepSpeed's own Muon (0.19.8) puts the
orthogonal matrix in the gradient's place before it clips, so that what is clipped is another norm than on one process,
and keeps whole momenta of its own. Here ZeRO treats gradients as it does under AdamW, momenta are shards like all
moments, and the step of each matrix is computed by one rank, from the runs that the others send it.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from mtp_lightning.recipe.schema.root import OptimizerSection
from mtp_lightning.training.strategies.param_shards import MatrixRun, RunsOf

MOMENTUM = "momentum_buffer"  # as torch.optim.Muon names it
ORTHOGONAL_TYPE = torch.bfloat16  # in which torch's iteration computes
MOST_BYTES = 2**28  # of matrices that are gathered at the same time, unless one alone is larger


@final
class MuonWithAdamW(torch.optim.Optimizer):
    """Steps groups marked `is_muon` by torch's Muon, or by shards where these are, and the other groups by AdamW."""

    def __init__(self, groups: list[dict[str, Any]], section: OptimizerSection, runs_of: RunsOf | None = None) -> None:
        """Take groups of parameters.

        Args:
            groups: with `weight_decay` and `is_muon`.
            section: of the recipe.
            runs_of: says what lies in a flat tensor, where ZeRO shards matrices; None where they are whole.
        """
        options: dict[str, Any] = {"momentum": section.muon.momentum, "nesterov": section.muon.nesterov}
        options |= {"ns_steps": section.muon.ns_steps, "adjust_lr_fn": section.muon.adjust_lr}
        beta1, beta2 = section.betas
        nothing = nn.Parameter(torch.zeros(1, 1))  # `step` brings the groups: ZeRO-3's parameters are empty here
        self._muon = torch.optim.Muon([nothing], lr=section.lr, **options)
        self._adamw = torch.optim.AdamW([nothing], lr=section.lr, betas=(beta1, beta2), eps=section.eps, fused=True)
        self._runs_of, self._runs = runs_of, dict[int, list[MatrixRun]]()
        for group in groups:
            for key, value in (self._muon if group["is_muon"] else self._adamw).defaults.items():
                group.setdefault(key, value)
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step all parameters that have gradients."""
        for optimizer in (self._adamw, self._muon):
            is_muon = optimizer is self._muon
            optimizer.state = self.state  # groups and state may have been replaced by another's, or by those of a file
            optimizer.param_groups = [group for group in self.param_groups if group["is_muon"] is is_muon]
            if is_muon and self._runs_of is not None:
                for group in optimizer.param_groups:
                    for flat in group["params"]:
                        self._step_shard(flat, group)
            else:
                optimizer.step()

    def _step_shard(self, flat: Tensor, group: dict[str, Any]) -> None:
        """Do what torch's Muon does to every matrix that a flat tensor is a shard of; all ranks call this."""
        if flat.grad is None:
            return
        state = self.state[flat]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(flat)
        momentum = state[MOMENTUM].lerp_(flat.grad, 1 - group["momentum"])
        update = flat.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        flat.mul_(1 - group["lr"] * group["weight_decay"])
        if id(flat) not in self._runs:
            assert self._runs_of is not None
            self._runs[id(flat)] = self._runs_of(flat)
        runs = iter(self._runs[id(flat)])
        while batch := list(_batch(runs)):
            for run, orthogonal in zip(batch, _orthogonalised(update, batch, group), strict=True):
                own = orthogonal.view(-1)[run.start : run.start + run.place.stop - run.place.start]
                flat[run.place].add_(own, alpha=-_adjust_lr(group["lr"], group["adjust_lr_fn"], torch.Size(run.shape)))


def _batch(runs: Iterator[MatrixRun]) -> Iterator[MatrixRun]:
    """Take as many matrices as there are ranks, or as many as fit."""
    num_bytes = 0
    for run in islice(runs, dist.get_world_size()):
        yield run
        num_bytes += 4 * run.shape[0] * run.shape[1]
        if num_bytes >= MOST_BYTES:
            return


def _orthogonalised(update: Tensor, batch: list[MatrixRun], group: dict[str, Any]) -> list[Tensor]:
    """Gather each matrix of a batch on a rank of its own, which makes it orthogonal and sends it to all others."""
    wholes = []
    for owner, run in enumerate(batch):
        whole = update.new_zeros(run.shape)
        num_own = run.place.stop - run.place.start
        whole.view(-1)[run.start : run.start + num_own] = update[run.place]
        dist.reduce(whole, dst=owner)
        wholes.append(whole)
    results = []
    for owner, whole in enumerate(wholes):
        result = torch.empty_like(whole, dtype=ORTHOGONAL_TYPE)
        if owner == dist.get_rank():
            result.copy_(_zeropower_via_newtonschulz(whole, group["ns_coefficients"], group["ns_steps"], group["eps"]))
        results.append(result)
    for owner, result in enumerate(results):
        dist.broadcast(result, src=owner)
    return results
