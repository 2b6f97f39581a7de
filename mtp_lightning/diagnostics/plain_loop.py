"""The reference training loop in plain torch that strategies are compared with: one process, one full backward."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mtp_lightning.losses.targets import IGNORE, shifted_targets
from mtp_lightning.model.freezing import freeze
from mtp_lightning.model.mtp_model import MtpModel, build_model
from mtp_lightning.recipe.schema.objective import MemorySection
from mtp_lightning.recipe.schema.root import OptimizerSection, Recipe
from mtp_lightning.training.step.optimizer import build_optimizer, parameter_groups
from mtp_lightning.training.strategies.param_shards import RunsOf

MOMENTUM = 0.9


class PlainStep(NamedTuple):
    """One optimizer step."""

    losses: list[float]  # mean over the valid targets of each offset
    gradients: dict[str, Tensor]  # before clipping
    weights: dict[str, Tensor]  # after the step


def random_batch(recipe: Recipe, step: int) -> dict[str, Tensor]:
    """A global batch of random rows with document boundaries and a loss mask; each (R, T+n), the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    shape = (recipe.batch.global_batch_size, recipe.data.seq_len + recipe.heads.num_offsets)
    return {
        "tokens": torch.randint(recipe.model.vocab_size, shape, generator=generator),
        "documents": (torch.rand(shape, generator=generator) < 0.1).cumsum(1),
        "loss_mask": torch.rand(shape, generator=generator) < 0.8,
    }


def reference_loop(recipe: Recipe, optimizer_name: str) -> list[PlainStep]:
    """Train a recipe's model on random batches for `run.steps` steps by one of the named optimizers, at its rate."""
    recipe = recipe.model_copy(update={"memory": MemorySection()})
    model = build_model(recipe)
    freeze(model, recipe)
    optimizer = build_named_optimizer(model, recipe.optimizer, optimizer_name)
    return [plain_step(model, optimizer, recipe, step) for step in range(recipe.run.steps)]


def plain_step(model: MtpModel, optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> PlainStep:
    """Do one optimizer step on a random batch by one full backward pass."""
    batch = random_batch(recipe, step)
    targets = shifted_targets(batch["tokens"], batch["documents"], recipe.heads.num_offsets, batch["loss_mask"])
    hiddens = model.hidden_states(batch["tokens"], batch["documents"])
    losses = [_plain_loss(model, offset, hidden, targets[offset - 1]) for offset, hidden in hiddens.items()]
    optimizer.zero_grad()
    torch.autograd.backward(torch.stack(losses).sum())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    if recipe.optimizer.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.max_grad_norm)
    optimizer.step()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return PlainStep([float(loss.detach()) for loss in losses], gradients, weights)


def _plain_loss(model: MtpModel, offset: int, hidden: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets that the offset scores."""
    logits, vocabulary = model.unembedding.logits(offset, hidden), model.unembedding.vocabulary(offset)
    if vocabulary is not None:
        logits, targets = vocabulary.columns_of(logits), vocabulary.places_of(targets)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)


def build_named_optimizer(
    model: MtpModel, section: OptimizerSection, name: str, runs_of: RunsOf | None = None
) -> torch.optim.Optimizer:
    """Build `sgd` (with momentum), `adamw` or `muon` over groups by role."""
    if name != "sgd":
        return build_optimizer(model, section, runs_of)
    return torch.optim.SGD(parameter_groups(model, section), lr=section.lr, momentum=MOMENTUM)
