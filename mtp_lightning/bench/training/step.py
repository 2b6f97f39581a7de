"""One real optimizer step on random tokens: what training does, without Lightning around it."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from mtp_lightning.errors import NonFiniteError
from mtp_lightning.losses.distillation import teacher_positions
from mtp_lightning.losses.targets import IGNORE, shifted_targets
from mtp_lightning.model.freezing import freeze
from mtp_lightning.model.mtp_model import build_model
from mtp_lightning.planner.layout import with_backward_order
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe.draft_vocabulary import with_first_ids
from mtp_lightning.recipe.learning_rate import learning_rate
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.trainable import first_offset_with_loss
from mtp_lightning.training.step.backward_order import accumulate_gradients
from mtp_lightning.training.step.batch import MicroBatch
from mtp_lightning.training.step.objective import Objective
from mtp_lightning.training.step.optimizer import build_optimizer, clip_gradients, set_learning_rate
from mtp_lightning.training.step.rollout import RolloutDraw
from mtp_lightning.training.strategies.device import loss_kernel_on
from mtp_lightning.training.strategies.param_shards import gradient_norms, whole_shards


class TrainingStep:
    """A recipe's model, optimizer and one batch of random rows, each row a document of its own.

    Every position has a target at every offset, and every offset that is not frozen has weight 1: the dearest batch
    that there is.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        recipe = with_first_ids(recipe)
        self.recipe, self.device = recipe, device
        self.model = build_model(recipe, device)
        freeze(self.model, recipe)
        self.model.loss_kernel = loss_kernel_on(recipe, device)
        if recipe.memory.compile:
            self.model.compile_parts()
        self.optimizer = build_optimizer(self.model, recipe.optimizer)
        set_learning_rate(self.optimizer, recipe.optimizer, learning_rate(recipe.optimizer, 0, recipe.run.steps))
        self.tokens = random_tokens(recipe).to(device)  # (R, T+n)
        self.documents = torch.zeros_like(self.tokens)
        self.targets = shifted_targets(self.tokens, self.documents, recipe.heads.num_offsets)  # (N, R, T)

    def run(self, backward_order: str, *, predicts: bool) -> None:
        """Do one optimizer step in a backward order; `predicts` takes every offset's argmax, as logged steps do."""
        counts = (self.targets != IGNORE).sum((1, 2))
        section = with_backward_order(self.recipe, backward_order).objective
        teacher_counts = teacher_positions(self.targets).sum((1, 2))
        num_frozen = first_offset_with_loss(self.recipe) - 1
        weights = [0.0] * num_frozen + [1.0] * (len(counts) - num_frozen)
        rollout = RolloutDraw.at(self.recipe, self.recipe.run.steps)
        objective = Objective(
            section, weights, counts, counts[0], predicts, teacher_counts=teacher_counts, rollout=rollout
        )
        for micro_batch in self._micro_batches():
            with self._autocast(enabled=self.recipe.run.precision == "bf16"):
                accumulate_gradients(self.model, micro_batch, objective, self._backward)
        self._update()

    def to(self, device: torch.device) -> None:
        """Move weights, optimizer state and batch, to make room for another model."""
        self.device = device
        self.tokens, self.documents, self.targets = (
            batch.to(device) for batch in (self.tokens, self.documents, self.targets)
        )
        self.model.to(device)
        for state in self.optimizer.state.values():
            state.update({key: value.to(device) for key, value in state.items()})

    def _micro_batches(self) -> Iterator[MicroBatch]:
        size = self.recipe.batch.micro_batch_size
        for start in range(0, len(self.tokens), size):
            rows = slice(start, start + size)
            yield MicroBatch(self.tokens[rows], self.documents[rows], self.targets[:, rows])

    def _autocast(self, *, enabled: bool) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _backward(self, loss: Tensor) -> None:
        with self._autocast(enabled=False):
            loss.backward()  # type: ignore[no-untyped-call]

    def _update(self) -> None:
        norms = gradient_norms(whole_shards(self.model.named_parameters(), self.optimizer), Ranks(device=self.device))
        if not math.isfinite(norms["all"]):
            raise NonFiniteError(
                "every gradient must be finite",
                "a gradient that is not, on random tokens",
                "Lower optimizer.lr or model.initializer_range, or use run.precision=fp32.",
            )
        if self.recipe.optimizer.max_grad_norm is not None:
            clip_gradients(self.model.parameters(), norms["all"], self.recipe.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def random_tokens(recipe: Recipe) -> Tensor:
    """Draw the rows of one optimizer step: (R, T+n)."""
    shape = (recipe.batch.global_batch_size, recipe.data.seq_len + recipe.heads.num_offsets)
    generator = torch.Generator().manual_seed(recipe.run.seed)
    return torch.randint(recipe.model.vocab_size, shape, generator=generator)
