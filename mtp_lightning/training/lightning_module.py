"""The Lightning module: one training step is one optimizer step under manual optimization.

To follow a step read `training_step` here, then `step/batch.py` (targets, weights, micro-batches), `step/vote.py` (the
reduction that all ranks begin with), `step/objective.py` (the loss), `step/backward_order.py` (which head goes when),
`losses/chunked.py` (a loss without a (T, V) tensor).
"""

import math
import resource
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.profiler import record_function

from mtp_lightning.errors import TrainingError
from mtp_lightning.losses.target_checks import ORACLE_STEPS, TargetCountCheck, check_targets
from mtp_lightning.model.freezing import check_trained, freeze
from mtp_lightning.model.kept_states import KeptStates, trunk_digest
from mtp_lightning.model.mtp_model import MtpModel, build_model
from mtp_lightning.planner.flops import flops_per_position, tokens_after
from mtp_lightning.planner.hardware import peak_flops_per_s
from mtp_lightning.recipe.learning_rate import learning_rate
from mtp_lightning.recipe.loading.load import RecipeLike, as_recipe
from mtp_lightning.training.draft_vocabulary import with_draft_vocabulary
from mtp_lightning.training.step.average import updated_averages
from mtp_lightning.training.step.backward_order import accumulate_gradients, evaluate
from mtp_lightning.training.step.batch import Batch, MicroBatch, PreparedBatch, prepare_batch
from mtp_lightning.training.step.gradient_checks import GradientChecksum, NonzeroGradientCheck
from mtp_lightning.training.step.metrics import RunMetrics, ThroughputClock, of_source
from mtp_lightning.training.step.objective import Objective, OffsetLosses
from mtp_lightning.training.step.optimizer import (
    build_optimizer,
    clip_gradients,
    rates_by_role,
    set_learning_rate,
)
from mtp_lightning.training.step.rollout import RolloutDraw
from mtp_lightning.training.step.skipped_steps import SkippedSteps
from mtp_lightning.training.step.times import StepTimes
from mtp_lightning.training.step.vote import AgreedCounts, StepVote, agree_on_step
from mtp_lightning.training.strategies.base import RunStrategy
from mtp_lightning.training.strategies.deterministic import DeterministicKernels
from mtp_lightning.training.strategies.device import loss_kernel_on
from mtp_lightning.training.strategies.own_trainer import OwnTrainerStrategy, check_trainer
from mtp_lightning.training.strategies.param_shards import gradient_norms


class MtpLightningModule(L.LightningModule):
    """Trains an `MtpModel` in the recipe's backward order, under `mtp train` or a Trainer of the user's own.

    Attributes:
        model: trunk, heads and unembedding.
        metrics: figures of the last logged step or validation, by column name of metrics.csv; filled right before the
            callbacks see the step, and emptied by the next.
        step_vote: how ranks agree to stop, and to save by the clock.
        throughput: tokens per second; callbacks pause it while they take time that is no training.
    """

    model: MtpModel

    def __init__(self, recipe: RecipeLike) -> None:
        """Take a recipe, the path of one, or its plain values, as `Recipe.model_dump` gives them."""
        super().__init__()
        recipe = as_recipe(recipe)
        self.automatic_optimization = False
        self.step_vote = StepVote()
        self.recipe = recipe
        self.metrics: dict[str, float] = {}
        self.skipped_steps = SkippedSteps(recipe.health.nonfinite)
        self.loaded_step = 0

    def configure_callbacks(self) -> list[Callback]:
        """Refuse a trainer of the user's own that would not do what the recipe says; add what is torch-wide."""
        if not isinstance(self.trainer.strategy, RunStrategy):
            check_trainer(self.trainer, self.recipe)
            return [DeterministicKernels(self.recipe)] if self.recipe.run.deterministic else []
        return []

    def setup(self, stage: str) -> None:
        """Begin to measure."""
        self.measured = RunMetrics.on(self.strategy.device, self.recipe)
        self.throughput = ThroughputClock(self.recipe, self.global_step)  # a validation may come before training

    def configure_model(self) -> None:
        """Build the model once, as the strategy wants it."""
        trains = self._trainer is not None  # else it is built by `load_from_checkpoint`
        if not hasattr(self, "model"):
            self.recipe = with_draft_vocabulary(self.recipe)  # under a Trainer of the user's own it has not been chosen
            self.model = (self.strategy.build_model if trains else build_model)(self.recipe)
            freeze(self.model, self.recipe)
            if self.recipe.memory.compile:
                self.model.compile_parts()
        if trains:
            self.model.loss_kernel = loss_kernel_on(self.recipe, self.strategy.device)

    @property
    def strategy(self) -> RunStrategy:
        """The run's strategy, or that of a trainer of the user's own in the same form."""
        strategy = self.trainer.strategy
        return strategy if isinstance(strategy, RunStrategy) else OwnTrainerStrategy(cast(Any, strategy))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, Muon and AdamW, or Adafactor, in groups by role."""
        return build_optimizer(self.model, self.recipe.optimizer, self.strategy.runs_of)

    def on_train_start(self) -> None:
        """Begin the checks anew after every start, resumed or not."""
        check_trained(self.model, self.recipe)
        goes_on = self.global_step > 0 or self.recipe.init.optimizer
        is_relative = self.recipe.optimizer.kind == "adafactor"
        self.gradient_check = NonzeroGradientCheck(
            self.model, self.strategy.ranks, has_moments=goes_on, is_relative=is_relative
        )
        self.gradient_checksum = GradientChecksum(self.model, self.strategy.ranks)
        self.target_check = TargetCountCheck()
        self.num_checked_steps = 0
        self.throughput = ThroughputClock(self.recipe, self.global_step)
        self.times = StepTimes(self.device)
        self.times.begin()
        self._keep_states()

    def _keep_states(self) -> None:
        """Let the states of a frozen trunk be kept where the recipe says so."""
        cache = self.recipe.memory.cache_hidden_states
        if cache is None:
            return
        if self.model.router_loss is not None:
            raise TrainingError(
                "memory.cache_hidden_states must be null for a trunk with experts: their routers have a loss",
                cache,
                "Remove memory.cache_hidden_states",
            )
        folder = Path(cache) / trunk_digest(self.model, self.recipe, self.strategy.whole)
        num_rows: int = self.trainer.datamodule.num_rows_read  # type: ignore[attr-defined]
        self.model.kept_states = KeptStates(folder, self.strategy.ranks, num_rows).states

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Run one optimizer step over this rank's sequences of the global batch.

        Ranks meet in `agree_on_step`, in the strategy where gradients are reduced, and in `_norms`.
        """
        step, self.metrics = self.global_step, {}
        prepared = prepare_batch(batch, self.recipe, step, self.strategy.sequence)
        self._check_targets(batch, prepared)
        self.times.end("data")
        counts = agree_on_step(prepared.counts, self.step_vote, self.strategy.ranks)
        self.times.end("reduce")
        weights_with_targets = self.target_check.look(counts.targets, prepared.weights)
        objective = replace(
            self._objective(prepared.weights, counts, weights_with_targets, predicts=self._is_logged(step + 1)),
            rollout=RolloutDraw.at(self.recipe, step),
        )
        losses: list[OffsetLosses] = []
        with record_function("step: forward, backward, reduction"), self.strategy.accumulating():
            for micro_batch in prepared.micro_batches:
                with self.autocast():
                    losses.append(accumulate_gradients(self.model, micro_batch, objective, self._backward))
            self.times.end("forward")
        self.times.end("reduce")
        norms = self._norms(losses, objective)
        self._step_optimizer(norms, objective, step, num_targets=sum(counts.targets))
        self.times.end("step")
        if math.isfinite(norms["all"]):
            for micro_batch, own in zip(prepared.micro_batches, losses, strict=True):
                self.measured.train.update(micro_batch.targets, own)
        num_shares = self.strategy.ranks.size // self.recipe.strategy.sequence_parallel
        self.trainer.datamodule.advance(len(batch["tokens"]) * num_shares)  # type: ignore[attr-defined]
        if self._is_logged(step + 1):
            self._log_step(step, norms)
            self._publish(self.metrics)
        if step + 1 == self.recipe.run.steps:
            self.trainer.should_stop = True  # Lightning 2.6 validates once more before it stops, whatever the interval

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Begin to wait for the next rows."""
        self.times.begin()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add held-out sequences to the validation metrics."""
        prepared = prepare_batch(batch, self.recipe, step=None, sequence=self.strategy.sequence)
        counts = agree_on_step(prepared.counts, self.step_vote, self.strategy.ranks)
        objective = self._objective(prepared.weights, counts, None, predicts=True)
        for micro_batch in prepared.micro_batches:
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
        """Note when the throughput clock is to pause."""
        self.validation_began_at = time.monotonic()

    def on_validation_end(self) -> None:
        """Subtract the validation from the throughput clock."""
        self.throughput.pause(time.monotonic() - self.validation_began_at)
        if self.trainer.training:
            self.times.begin()

    def forward(self, *args: Any, **named: Any) -> Any:
        """Refuse a call: what it would return is one of several things, each of which has a function of its own.

        Raises:
            TrainingError: Always.
        """
        raise TrainingError(
            "MtpLightningModule is trained and validated, not called (nor given to Trainer.predict)",
            "a call of the module",
            "For texts use mtp_lightning.generate(module, prompts); for states and scores module.model.hidden_states "
            "and module.model.unembedding.logits",
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what has been measured since the last logged step, so that a resumed run logs the same figures.

        A checkpoint of Lightning's own holds the recipe, for `load_from_checkpoint`.
        """
        if isinstance(self.strategy, OwnTrainerStrategy):
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = {"recipe": self.recipe.model_dump(mode="json")}
        ranks, state = self.strategy.ranks, self.measured.train.metric_state
        sums = {name: ranks.sum(value) for name, value in state.items() if isinstance(value, Tensor)}
        checkpoint["train_metrics"] = {name: value.cpu() for name, value in sums.items()}
        checkpoint["skipped_steps"] = self.skipped_steps.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on measuring where the checkpoint was taken; what all ranks had measured, the first goes on with."""
        self.loaded_step = checkpoint["global_step"]
        if self._trainer is None:  # by `load_from_checkpoint`
            return
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
        figures = {f"val/{name}": figure for name, figure in figures.items()}
        self.metrics |= figures
        self._publish(figures)

    def _check_targets(self, batch: Batch, prepared: PreparedBatch) -> None:
        """Compare targets with the slow oracle in the first steps of every start."""
        if self.num_checked_steps < ORACLE_STEPS:
            check_targets(batch["tokens"], batch["documents"], batch.get("loss_mask"), prepared.targets)
            self.num_checked_steps += 1

    def _objective(
        self, weights: list[float], counts: AgreedCounts, weights_with_targets: list[float] | None, *, predicts: bool
    ) -> Objective:
        """Put together the loss of every micro-batch of a step; no communication."""
        return Objective(
            self.recipe.objective,
            weights,
            counts.on_device.targets,
            num_ordered=counts.on_device.ordered,
            predicts=predicts,
            num_ranks=self.strategy.ranks.size,
            teacher_counts=counts.on_device.teachers,
            loss_scale=self.strategy.gradient_scale,
            weights_with_targets=weights_with_targets,
        )

    def autocast(self) -> torch.autocast:
        """Surround what computes with the model, in the precision of the run."""
        is_enabled = self.recipe.run.precision == "bf16" and self.recipe.strategy.kind == "single"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_enabled)

    def _backward(self, loss: Tensor) -> None:
        self.times.end("forward")
        with torch.autocast(self.device.type, enabled=False), record_function("step: backward"):
            self.manual_backward(loss)
        self.times.end("backward")

    def _norms(self, parts: list[OffsetLosses], objective: Objective) -> dict[str, float]:
        """Gradient norms before clipping by role; `all` is finite only if the losses of all ranks are, too."""
        strategy = self.strategy
        learnt = [offset - 1 for offset in parts[0].computed if objective.weights[offset - 1] > 0]
        sums = torch.stack([part.nll_sums for part in parts]).sum(0)
        loss = torch.stack([sums[place] for place in learnt]).sum() if learnt else sums.new_zeros(())
        return gradient_norms(strategy.param_shards(), strategy.ranks, loss_scale=strategy.gradient_scale, loss=loss)

    def _step_optimizer(self, norms: dict[str, float], objective: Objective, step: int, *, num_targets: int) -> None:
        """Check, clip, step, zero: once per optimizer step."""
        optimizer, strategy, section = self.optimizers(), self.strategy, self.recipe.optimizer
        assert not isinstance(optimizer, list)
        has_effect = math.isfinite(norms["all"]) and objective.has_targets
        if has_effect:
            self.skipped_steps.end()
            clip = 1.0 if section.max_grad_norm is None else min(1.0, section.max_grad_norm / max(norms["all"], 1e-30))
            scale = clip / strategy.gradient_scale
            self.gradient_check.before_step(
                objective.weights_with_targets or [], strategy.param_shards(), scale=scale, num_targets=num_targets
            )
            self.gradient_checksum.compare(strategy.param_shards())
            if section.max_grad_norm is not None and strategy.clips_here:
                clip_gradients(self.model.parameters(), norms["all"], section.max_grad_norm)
        else:
            self.gradient_checksum.forget()
            self._skip(norms, objective, step)
        rate = learning_rate(section, step, self.recipe.run.steps)
        set_learning_rate(optimizer.optimizer, section, rate)
        with record_function("step: optimizer"):
            optimizer.step()  # counts the step, skipped or not
        if has_effect and rate > 0:  # the last step of a decay to zero moves nothing
            least = min(group.get("rate_factor", 1.0) for group in optimizer.optimizer.param_groups)
            self.gradient_check.after_step(strategy.param_shards(), rates_by_role(section, rate * least))
        if section.ema is not None:
            strategy.averages = updated_averages(strategy.averages, strategy.param_shards(), section.ema, step)
        optimizer.zero_grad(set_to_none=True)

    def _skip(self, norms: dict[str, float], objective: Objective, step: int) -> None:
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

    def _log_step(self, step: int, norms: dict[str, float]) -> None:
        has_any = self.measured.train.update_called  # unless all steps since the last row were skipped, on all ranks
        figures = self.measured.train.compute() if has_any else {}
        self.measured.train.reset()
        recipe, rate = self.recipe, self.throughput.lap(step + 1)
        self.metrics |= {
            "step": step + 1,
            "tokens": tokens_after(recipe, step + 1),
            "lr": learning_rate(recipe.optimizer, step, recipe.run.steps),
            **{f"train/{name}": figure for name, figure in figures.items()},
            **{f"grad_norm/{role}": norm for role, norm in norms.items()},
            "skipped_steps": self.skipped_steps.total,
            "tokens_per_s": rate,
            **({} if self.peak_tokens_per_s is None else {"mfu": rate / self.peak_tokens_per_s}),
            "memory_gib": self._memory_bytes() / 2**30,
            **self.times.lap(self.strategy.ranks),
        }

    def _publish(self, figures: dict[str, float]) -> None:
        """Hand figures to the loggers and callbacks of a trainer of the user's own; ranks agree on them.

        Lightning would log a training step only where its own interval falls on it, so loggers get that row directly.
        """
        if isinstance(self.trainer.strategy, RunStrategy):
            return
        loggers, is_step = self.trainer.loggers, self.trainer.training
        self.log_dict(figures, logger=bool(loggers) and not is_step, sync_dist=self.trainer.world_size > 1)
        for logger in loggers if is_step else ():
            logger.log_metrics(figures, step=self.global_step)

    @cached_property
    def peak_tokens_per_s(self) -> float | None:
        """Tokens per second at the peak of all ranks' GPUs, from their data sheet; None for a device without one."""
        if self.device.type != "cuda":
            return None
        precision = "fp32" if self.recipe.run.precision == "fp32" else "bf16"
        peak = peak_flops_per_s(torch.cuda.get_device_name(self.device), precision)
        return None if peak is None else peak * self.strategy.ranks.size / flops_per_position(self.recipe)

    def _memory_bytes(self) -> int:
        """Peak memory so far: the device's allocator on CUDA, this process's resident set on the CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
