"""Mends taken out again, so that the laws are seen to fail."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy

from mtp_lightning.training.step.gradient_checks import NonzeroGradientCheck
from mtp_lightning.training.step.metrics import RunMetrics
from mtp_lightning.training.strategies import zero
from mtp_lightning.training.strategies.param_shards import ParamShard
from tests.support.fake_cuda.patches import silent

ON = RunMetrics.on


def metrics_on_the_cpu() -> Iterator[Any]:
    """Leave metrics where they are made."""
    yield mock.patch.object(RunMetrics, "on", lambda device, recipe: ON(torch.device("cpu"), recipe))


def collectives_where_shards_are() -> Iterator[Any]:
    """Compare notes of gradients where the last of them is that this rank holds, or on the host."""
    real = NonzeroGradientCheck.before_step

    def before_step(self: NonzeroGradientCheck, weights: Any, shards: Iterable[ParamShard], **options: Any) -> None:
        held = list(shards)
        real(self, weights, held, **options)
        if self.pending:
            devices = [own.weight.device for own in held if own.name in self.watched]
            torch.distributed.all_reduce(torch.zeros(1, device=devices[-1] if devices else "cpu"))

    yield mock.patch.object(NonzeroGradientCheck, "before_step", before_step)


def gpus_by_rank() -> Iterator[Any]:
    """Leave it to Lightning and DeepSpeed which GPU is whose, and NCCL to whichever is current."""
    yield mock.patch("mtp_lightning.training.strategies.device.rank_from_env", silent())


def engines_as_they_end() -> Iterator[Any]:
    """Leave it to DeepSpeed and the collector to let engines go."""
    yield mock.patch.object(zero.ZeroStrategy, "teardown", DeepSpeedStrategy.teardown)


def types_by_lightning() -> Iterator[Any]:
    """Let Lightning cast the module before DeepSpeed asks for its type."""
    yield mock.patch.object(zero._AsBuilt, "convert_module", DeepSpeedPrecision.convert_module)


def types_unchecked() -> Iterator[Any]:
    """The same, and nobody compares."""
    yield from types_by_lightning()
    yield mock.patch.object(zero.ZeroStrategy, "_check_compute_type", silent())


BREAKAGES: dict[str, Callable[[], Iterator[Any]]] = {
    own.__name__: own
    for own in (
        metrics_on_the_cpu,
        collectives_where_shards_are,
        gpus_by_rank,
        engines_as_they_end,
        types_by_lightning,
        types_unchecked,
    )
}
