"""Train under a Trainer that the user has built: what is refused, and Lightning's strategies in the form we need.

The module computes gradients head by head in several backward passes, so nothing of Lightning's automatic optimization
applies to it. Under DDP the passes of a step accumulate locally, and gradients are averaged over the ranks once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, final

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mtp_lightning.checkpoint.format.reader_view import Reader
from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.errors import TrainingError
from mtp_lightning.model.mtp_model import MtpModel, build_model
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.strategies.base import RunStrategy
from mtp_lightning.training.strategies.param_shards import ParamShard, check_names, provide_moments, whole_shards

BUCKET_ENTRIES = 2**23  # of gradients that are reduced together


@final
class OwnTrainerStrategy(RunStrategy):
    """Lightning's own single-device or DDP strategy: every rank holds the whole model."""

    clips_here = True

    def __init__(self, strategy: SingleDeviceStrategy | DDPStrategy) -> None:
        self._strategy = strategy

    @property
    def root_device(self) -> torch.device:
        """This rank's device."""
        return self._strategy.root_device

    @property
    def lightning_module(self) -> L.LightningModule | None:
        """The module, without the wrapper of DDP."""
        return self._strategy.lightning_module

    def build_model(self, recipe: Recipe) -> MtpModel:
        """Build the whole model on the CPU; Lightning moves it."""
        return build_model(recipe)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Let autograd add up the passes of a step on this rank, then average over the ranks, once."""
        wrapper: Any = self._strategy.model
        if not isinstance(wrapper, DistributedDataParallel):
            yield
            return
        with wrapper.no_sync():  # else every pass would be reduced, and parameters it does not reach waited for
            yield
        average_gradients([p for p in wrapper.parameters() if p.requires_grad])

    def param_shards(self) -> Iterator[ParamShard]:
        """Yield this rank's share of the parameters, each whole: all ranks hold the same."""
        shares = list(self.named_parameters())[self.ranks.rank :: self.ranks.size]
        return whole_shards(shares, self._strategy.optimizers[0])

    def discard_gradients(self) -> None:
        """Take the gradients away: an optimizer of torch passes over parameters without."""
        self._strategy.optimizers[0].zero_grad(set_to_none=True)

    def fill(self, reader: Reader) -> None:
        """Read every parameter whole, on every rank."""
        optimizer = self._strategy.optimizers[0]
        check_names(reader, self.named_parameters())
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                provide_moments(optimizer, parameter, reader, name)
        for shard in whole_shards(self.named_parameters(), optimizer):
            shard.read_from(reader)


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Average gradients over all ranks, in place; a parameter that has none on any rank keeps none."""
    for bucket in _buckets(parameters):
        present = torch.tensor([p.grad is not None for p in bucket], device=bucket[0].device)
        flat = torch.cat(
            [
                present.to(bucket[0].dtype),
                *((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in bucket),
            ]
        )
        dist.all_reduce(flat)
        counts, *sums = torch.split(flat, [len(bucket), *(p.numel() for p in bucket)])
        for parameter, total, count in zip(bucket, sums, counts.tolist(), strict=True):
            parameter.grad = total.view_as(parameter).div_(dist.get_world_size()) if count else None


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Group neighbours of one type, each group the same on all ranks."""
    bucket: list[nn.Parameter] = []
    entries = 0
    for parameter in parameters:
        if bucket and (parameter.dtype != bucket[0].dtype or entries + parameter.numel() > BUCKET_ENTRIES):
            yield bucket
            bucket, entries = [], 0
        bucket.append(parameter)
        entries += parameter.numel()
    if bucket:
        yield bucket


class _Check(NamedTuple):
    """A condition on the trainer of a user."""

    holds: bool
    expected: str
    found: str
    hint: str


def check_trainer(trainer: L.Trainer, recipe: Recipe) -> None:
    """Refuse a trainer that would train something else than the recipe says, or ignore a part of it in silence.

    Raises:
        TrainingError: The first thing found.
    """
    for check in (*_strategy_checks(trainer, recipe), *_flag_checks(trainer, recipe), *_recipe_checks(trainer, recipe)):
        if not check.holds:
            raise TrainingError(check.expected, check.found, check.hint)


def _strategy_checks(trainer: L.Trainer, recipe: Recipe) -> Iterator[_Check]:
    strategy = trainer.strategy
    is_ddp = type(strategy) is DDPStrategy
    yield _Check(
        is_ddp or isinstance(strategy, SingleDeviceStrategy),
        "a Trainer of your own must use one device or DDP: sharding needs the strategies of `mtp train`",
        f"Trainer(strategy={type(strategy).__name__})",
        'Use strategy="ddp", or set strategy.kind=zero1, zero2 or zero3 in the recipe and run `mtp train`.',
    )
    yield _Check(
        recipe.strategy.kind == "single",
        "the strategy of a Trainer of your own replaces that of the recipe",
        f"strategy.kind={recipe.strategy.kind}",
        "Set strategy.kind=single, or train this recipe with `mtp train`.",
    )
    hook = getattr(strategy, "_ddp_comm_hook", None) or getattr(strategy, "_model_averager", None)
    yield _Check(
        hook is None,
        "gradients are averaged once per step by the module, so DDP can have no hook of its own",
        f"DDPStrategy with {getattr(hook, '__name__', type(hook).__name__)}",
        "Remove ddp_comm_hook and model_averaging_period.",
    )
    device = strategy.root_device.type
    yield _Check(
        device in ("cpu", "cuda") and recipe.run.device in ("auto", device),
        f"the Trainer's device must be that of run.device={recipe.run.device} (cpu or cuda)",
        f"a Trainer on {device}",
        'Set run.device=auto and choose with Trainer(accelerator="cpu" or "gpu").',
    )


def _flag_checks(trainer: L.Trainer, recipe: Recipe) -> Iterator[_Check]:
    precision, overfit_batches = trainer.precision_plugin, getattr(trainer, "overfit_batches", 0)
    yield _Check(
        type(precision) is Precision,
        "the precision of a run is the recipe's: a precision plugin would cast what the module computes",
        f"Trainer(precision={precision.precision!r})",
        'Leave Trainer(precision="32-true") and set run.precision=bf16 in the recipe.',
    )
    yield _Check(
        not trainer.gradient_clip_val,
        "gradients are clipped by the module, over all ranks",
        f"Trainer(gradient_clip_val={trainer.gradient_clip_val})",
        "Remove it and set optimizer.max_grad_norm in the recipe.",
    )
    yield _Check(
        trainer.accumulate_grad_batches == 1,
        "one batch of the data module is one optimizer step; micro-batches are cut inside it",
        f"Trainer(accumulate_grad_batches={trainer.accumulate_grad_batches})",
        "Remove it and set batch.global_batch_size and batch.micro_batch_size in the recipe.",
    )
    yield _Check(
        not overfit_batches,
        "the data module gives new rows at every step",
        f"Trainer(overfit_batches={overfit_batches})",
        "Remove it; to train on few documents give the recipe few (data.corpus).",
    )
    yield _Check(
        trainer.max_steps <= recipe.run.steps,
        "the learning rate is planned for run.steps, and training ends there",
        f"Trainer(max_steps={trainer.max_steps}) and run.steps={recipe.run.steps}",
        f"Set run.steps={trainer.max_steps} in the recipe, or lower max_steps.",
    )


def _recipe_checks(trainer: L.Trainer, recipe: Recipe) -> Iterator[_Check]:
    data = getattr(trainer, "datamodule", None)
    yield _Check(
        isinstance(data, MtpDataModule) and data.recipe == recipe,
        "MtpLightningModule must be trained on MtpDataModule of the same recipe",
        "one of another recipe" if isinstance(data, MtpDataModule) else f"{type(data).__name__}",
        "Call trainer.fit(MtpLightningModule(recipe), datamodule=MtpDataModule(recipe)).",
    )
    yield _Check(
        not recipe.phases,
        "a Trainer of your own trains a recipe of one phase",
        f"phases {', '.join(recipe.phases)}",
        "Train the phases with `mtp train`, or give each a recipe and a Trainer.",
    )
    yield _Check(
        recipe.optimizer.ema is None,
        "under a Trainer of your own no average of the weights is kept",
        "optimizer.ema",
        "Set optimizer.ema=null and give the Trainer Lightning's callback EMAWeightAveraging, or run `mtp train`.",
    )
    yield _Check(
        recipe.debug.profile_steps is None,
        "under a Trainer of your own no steps are profiled by the recipe",
        f"debug.profile_steps={recipe.debug.profile_steps}",
        "Set debug.profile_steps=null and give the Trainer one of Lightning's profilers, or run `mtp train`.",
    )
    module = getattr(trainer, "lightning_module", None)
    is_compiled = any(getattr(module, name, None) for name in ("_compiler_ctx", "_compiled_call_impl"))
    yield _Check(
        not is_compiled,
        "parts of the model are compiled by the module: a whole step, with its checks and backward passes, cannot be",
        "a module that was given to torch.compile",
        "Give the module as it is, and set memory.compile=true in the recipe.",
    )
    provided = {getattr(callback, "recipe_field", None) for callback in getattr(trainer, "callbacks", [])}
    wanted = {
        "init.path": recipe.init.path is not None,
        "health.drift": recipe.health.drift not in ("auto", None),
        "run.early_stop": recipe.run.early_stop is not None,
    }
    missing = [field for field, is_set in wanted.items() if is_set and field not in provided]
    yield _Check(
        not missing,
        "parts of the recipe that callbacks carry out need these callbacks",
        f"{', '.join(missing)} without",
        "Give Trainer(callbacks=recipe_callbacks(recipe)), from mtp_lightning import recipe_callbacks.",
    )
