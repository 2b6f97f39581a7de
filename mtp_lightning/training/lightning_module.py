"""The Lightning module: one training step is one optimizer step under manual optimization."""

import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor

from mtp_lightning.losses.distillation import teacher_positions
from mtp_lightning.losses.targets import count_targets, shifted_targets
from mtp_lightning.losses.weights import offset_weights
from mtp_lightning.model.freezing import first_taught, freeze
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.planner.flops import tokens_after
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.health.rollback import SkippedSteps
from mtp_lightning.training.step.backward_order import evaluate, run_schedule
from mtp_lightning.training.step.gradient_checks import (
    ORACLE_STEPS,
    GradientArrival,
    GradientSums,
    TargetArrival,
    check_targets,
)
from mtp_lightning.training.step.metrics import RunMetrics, of_source
from mtp_lightning.training.step.objective import MicroBatch, Objective, OffsetLosses
from mtp_lightning.training.step.optimizer import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    rates_by_role,
    set_learning_rate,
)
from mtp_lightning.training.strategies.base import RunStrategy
from mtp_lightning.training.strategies.param_shards import gradient_norms

Batch = dict[str, Tensor]
NUM_URGENCIES = 3  # go on, stop, stop and requeue


class MtpLightningModule(L.LightningModule):
    """Trains an `MtpModel` by the recipe's schedule.

    `metrics` holds the figures of the last logged step or validation, by column name of metrics.csv; it is
    filled right before the callbacks see the step, and emptied by the next.
    """

    model: MtpModel

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.urgency: Callable[[], int] = lambda: 0  # how much this rank wants to stop; asked once per reduction
        self.agreed_urgency = 0  # the most urgent of all ranks, as of the last one
        self.recipe = recipe
        self.metrics: dict[str, float] = {}
        self.skipped_steps = SkippedSteps(recipe.health.nonfinite)

    def setup(self, stage: str) -> None:
        """Begin to measure."""
        self.measured = RunMetrics.on(self.strategy.device, self.recipe)

    def configure_model(self) -> None:
        """Build the model once, as the strategy wants it."""
        if not hasattr(self, "model"):
            self.model = self.strategy.build_model(self.recipe)
            freeze(self.model, self.recipe)
            if self.recipe.memory.compile:
                self.model.compile_layers()

    @property
    def strategy(self) -> RunStrategy:
        """The run's strategy."""
        return cast(RunStrategy, self.trainer.strategy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW in groups by role."""
        return build_optimizer(self.model, self.recipe.optimizer)

    def on_train_start(self) -> None:
        """Begin the checks anew after every start, resumed or not."""
        self.gradient_arrival = GradientArrival(self.model, self.strategy.ranks)
        self.gradient_sums = GradientSums(self.model, self.strategy.ranks)
        self.target_arrival = TargetArrival()
        self.num_checked_steps = 0
        self.logged_at, self.logged_step = time.monotonic(), self.global_step

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Run one optimizer step over this rank's rows of the global batch."""
        step = self.global_step
        self.metrics = {}
        objective, targets = self._prepare(batch, step)
        parts: list[tuple[Tensor, OffsetLosses]] = []
        with self.strategy.accumulating():
            for micro_batch in self._micro_batches(batch, targets):
                with self.autocast():
                    losses = run_schedule(self.model, micro_batch, objective, self._backward)
                parts.append((micro_batch.targets, losses))
        norms = self._norms(parts, objective.weights)
        is_finite = math.isfinite(norms["all"])
        self._step_optimizer(norms, objective, step)
        for part in parts if is_finite else ():
            self.measured.train.update(*part)
        self.trainer.datamodule.advance(len(batch["tokens"]) * self.strategy.ranks.size)  # type: ignore[attr-defined]
        if self._is_logged(step + 1):
            self._log_step(step, norms)
        if step + 1 == self.recipe.run.steps:
            self.trainer.should_stop = True  # Lightning 2.6 validates once more before it stops, whatever the interval

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add held-out rows to the validation metrics."""
        targets = self._targets(batch)
        objective = self._objective(targets, batch["documents"], [1.0] * len(targets), predicts=True)
        for micro_batch in self._micro_batches(batch, targets):
            with self.autocast():
                losses = evaluate(self.model, micro_batch, objective)
            self.measured.validation.update(micro_batch.targets, losses)
            if micro_batch.sources is not None:
                self._update_sources(micro_batch, micro_batch.sources, losses)

    def _update_sources(self, micro_batch: MicroBatch, sources: Tensor, losses: OffsetLosses) -> None:
        """Add rows to the figures of the sources that they come from."""
        names = self.trainer.datamodule.validation_samples.source_names  # type: ignore[attr-defined]
        for name, metrics in self.measured.by_source.items():
            chosen = sources == names.index(name)
            if chosen.any():
                metrics.update(micro_batch.targets[:, chosen], losses.of_rows(chosen))

    def on_validation_start(self) -> None:
        """Stop the clock of tokens per second."""
        self.validation_began_at = time.monotonic()

    def on_validation_end(self) -> None:
        """Let the clock of tokens per second go on."""
        self.exclude_time(time.monotonic() - self.validation_began_at)

    def exclude_time(self, spent_s: float) -> None:
        """Leave time that went into something else than training out of tokens per second."""
        self.logged_at += spent_s

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what has been measured since the last logged step, so that a resumed run logs the same figures."""
        ranks, state = self.strategy.ranks, self.measured.train.metric_state
        sums = {name: ranks.sum(value) for name, value in state.items() if isinstance(value, Tensor)}
        checkpoint["train_metrics"] = {name: value.cpu() for name, value in sums.items()}
        checkpoint["skipped_steps"] = self.skipped_steps.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on measuring where the checkpoint was taken; what all ranks had measured, the first goes on with."""
        for name, value in checkpoint["train_metrics"].items():
            own = value if self.strategy.ranks.is_first else torch.zeros_like(value)
            setattr(self.measured.train, name, own.to(self.strategy.device))
        self.skipped_steps.load(checkpoint.get("skipped_steps", {}))

    def on_validation_epoch_end(self) -> None:
        """Publish the validation's figures and forget its sums."""
        figures = self.measured.validation.compute()
        self.measured.validation.reset()
        for source, metrics in self.measured.by_source.items():
            figures |= of_source(metrics.compute(), source)
            metrics.reset()
        self.metrics |= {f"val/{name}": figure for name, figure in figures.items()}

    def _prepare(self, batch: Batch, step: int) -> tuple[Objective, Tensor]:
        """Targets and objective of a step, checked on the first steps of every start."""
        targets = self._targets(batch)
        if self.num_checked_steps < ORACLE_STEPS:
            check_targets(batch["tokens"], batch["documents"], batch.get("loss_mask"), targets)
            self.num_checked_steps += 1
        weights = offset_weights(self.recipe.objective.weights, len(targets), step, self.recipe.run.steps)
        num_frozen = first_taught(self.recipe) - 1
        weights[:num_frozen] = [0.0] * num_frozen
        objective = self._objective(targets, batch["documents"], weights, predicts=self._is_logged(step + 1))
        taught = self.target_arrival.look(objective.counts.tolist(), weights)
        return replace(objective, taught=taught), targets

    def _targets(self, batch: Batch) -> Tensor:
        num_offsets = self.recipe.heads.num_offsets
        return shifted_targets(batch["tokens"], batch["documents"], num_offsets, batch.get("loss_mask"))

    def _objective(self, targets: Tensor, documents: Tensor, weights: list[float], *, predicts: bool) -> Objective:
        num_positions = targets.shape[2]
        num_ordered = (documents[:, :num_positions] == documents[:, 1 : num_positions + 1]).sum()
        own = (count_targets(targets), teacher_positions(targets).sum((1, 2)), num_ordered[None])
        votes = num_ordered.new_tensor([self.urgency() == level for level in range(NUM_URGENCIES)])
        counts = self.strategy.ranks.sum(torch.cat((*own, votes)))
        counts, votes = counts[:-NUM_URGENCIES], counts[-NUM_URGENCIES:]
        self.agreed_urgency = int(votes.nonzero().max())
        return Objective(
            self.recipe.objective,
            weights,
            counts[: len(targets)],
            counts[-1],
            predicts,
            num_ranks=self.strategy.ranks.size,
            teacher_counts=counts[len(targets) : -1],
            loss_scale=self.strategy.gradient_scale,
        )

    def _micro_batches(self, batch: Batch, targets: Tensor) -> Iterator[MicroBatch]:
        size = self.recipe.batch.micro_batch_size
        for start in range(0, len(batch["tokens"]), size):
            rows = slice(start, start + size)
            sources = batch["sources"][rows] if "sources" in batch else None
            yield MicroBatch(batch["tokens"][rows], batch["documents"][rows], targets[:, rows], sources)

    def autocast(self) -> torch.autocast:
        """Surround what computes with the model, in the precision of the run."""
        is_enabled = self.recipe.run.precision == "bf16" and self.recipe.strategy.kind == "single"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_enabled)

    def _backward(self, loss: Tensor) -> None:
        with torch.autocast(self.device.type, enabled=False):
            self.manual_backward(loss)

    def _norms(self, parts: list[tuple[Tensor, OffsetLosses]], weights: list[float]) -> dict[str, Tensor]:
        """Gradient norms before clipping by role; `all` is finite only if the losses of all ranks are, too."""
        strategy = self.strategy
        has_weight = torch.tensor(weights, device=self.device) > 0  # the others need not have been computed
        losses = torch.stack([losses.nll_sums for _, losses in parts]).sum(0)[has_weight]
        return gradient_norms(
            strategy.fragments(), strategy.ranks, loss_scale=strategy.gradient_scale, loss=losses.sum()
        )

    def _step_optimizer(self, norms: dict[str, Tensor], objective: Objective, step: int) -> None:
        """Check, clip, step, zero: once per optimizer step."""
        optimizer, strategy, section = self.optimizers(), self.strategy, self.recipe.optimizer
        assert not isinstance(optimizer, list)
        has_effect = math.isfinite(norms["all"]) and objective.teaches
        if has_effect:
            self.skipped_steps.end()
            clip = (
                1.0
                if section.max_grad_norm is None
                else min(1.0, section.max_grad_norm / max(float(norms["all"]), 1e-30))
            )
            scale = clip / strategy.gradient_scale
            self.gradient_arrival.before_step(objective.taught or [], strategy.fragments(), scale=scale)
            self.gradient_sums.compare(strategy.fragments())
            if section.max_grad_norm is not None and strategy.clips_here:
                clip_gradients(self.model.parameters(), norms["all"], section.max_grad_norm)
        else:
            self.gradient_sums.forget()
            self._skip(norms, objective, step)
        rate = learning_rate(section, step, self.recipe.run.steps)
        set_learning_rate(optimizer.optimizer, section, rate)
        optimizer.step()  # counts the step, skipped or not
        if has_effect and rate > 0:  # the last step of a decay to zero moves nothing
            self.gradient_arrival.after_step(strategy.fragments(), rates_by_role(section, rate))
        optimizer.zero_grad(set_to_none=True)

    def _skip(self, norms: dict[str, Tensor], objective: Objective, step: int) -> None:
        """Make the optimizer step leave everything as it is.

        Raises:
            NonFiniteStreak: Too many steps in a row were not finite.
        """
        bad = [role for role, norm in norms.items() if role != "all" and not math.isfinite(norm)]
        if bad and self.recipe.run.precision == "fp16":
            self.skipped_steps.total += 1  # fp16 searches for its loss scale by overflowing: DeepSpeed skips by itself
            return
        first = self.trainer.datamodule.rows_consumed  # type: ignore[attr-defined]
        rows = range(first, first + self.recipe.batch.batch_size_at(first))
        if math.isfinite(norms["all"]):
            self.skipped_steps.pass_over(step + 1, rows)
        else:
            found = f"a gradient of {', '.join(bad)}" if bad else "a loss"
            self.skipped_steps.add(found, step + 1, rows)
        self.strategy.discard_gradients()

    def _is_logged(self, done_steps: int) -> bool:
        """Predictions cost a pass over the logits, so they are taken on logged steps only."""
        return done_steps % self.recipe.logging.every_steps == 0 or done_steps == self.recipe.run.steps

    def _log_step(self, step: int, norms: dict[str, Tensor]) -> None:
        has_any = self.measured.train.update_called  # unless all steps since the last row were skipped, on all ranks
        figures = self.measured.train.compute() if has_any else {}
        self.measured.train.reset()
        recipe, now = self.recipe, time.monotonic()
        tokens, tokens_before = tokens_after(recipe, step + 1), tokens_after(recipe, self.logged_step)
        self.metrics |= {
            "step": step + 1,
            "tokens": tokens,
            "lr": learning_rate(recipe.optimizer, step, recipe.run.steps),
            **{f"train/{name}": figure for name, figure in figures.items()},
            **{f"grad_norm/{role}": float(norm) for role, norm in norms.items()},
            "skipped_steps": self.skipped_steps.total,
            "tokens_per_s": (tokens - tokens_before) / (now - self.logged_at),
            "memory_gib": self._memory_bytes() / 2**30,
        }
        self.logged_at, self.logged_step = now, step + 1

    def _memory_bytes(self) -> int:
        """Peak memory so far: the device's allocator on CUDA, this process's resident set on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
