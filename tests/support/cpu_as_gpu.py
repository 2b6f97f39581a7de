"""A rank that trains on the CPU what is for GPUs only, fp16 and offloading, and prints how far it is from plain torch.

Arguments: cells as stage:precision:optimizer's place:parameters' place. Prints one line of JSON: of each cell the
relative errors of gradients and weights, the type that DeepSpeed computes in, and its loss scale at every step. With
`overflow` for the precision: the loss scales of fp16 that begins too high, and the number of steps skipped for that.
"""

import json
import logging
import os
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from unittest import mock

import lightning as L

from mtp_lightning.diagnostics import parity
from mtp_lightning.diagnostics.parity import RandomData
from mtp_lightning.diagnostics.parity_matrix import Cell
from mtp_lightning.launch.rank_env import rank_from_env
from mtp_lightning.ranks import Ranks
from mtp_lightning.training.fit import build_trainer
from mtp_lightning.training.lightning_module import MtpLightningModule
from mtp_lightning.training.strategies import device
from mtp_lightning.training.strategies.process_group import process_group
from mtp_lightning.training.strategies.zero import ZeroStrategy

HIGH = 22  # 2^22 times a gradient of about 0.1 is more than fp16 holds
RECIPE = Cell.recipe.fget


def outcome_of(cell, precision, optimizer, parameters):
    """Train a cell."""

    def recipe(self):
        plain = RECIPE(self)
        if self.stage == "single":
            return plain
        places = {"offload_optimizer": optimizer, "offload_parameters": parameters}
        changes = {"run": {"precision": precision}, "strategy": places}
        return plain.model_copy(update={k: getattr(plain, k).model_copy(update=v) for k, v in changes.items()})

    scales, types, step = [], set(), ZeroStrategy.optimizer_step

    def noted(self, *arguments, **options):
        types.add(str(self._zero.dtype) if hasattr(self._zero, "dtype") else "unknown")
        scales.append(self.gradient_scale)
        return step(self, *arguments, **options)

    with mock.patch.object(Cell, "recipe", property(recipe)), mock.patch.object(ZeroStrategy, "optimizer_step", noted):
        done = parity.run_cell(cell)
    errors = {"gradients": done.gradients, "weights": done.weights, "failure": done.failure}
    return errors | {"scales": scales, "types": sorted(types)}


def scales_found(cell):
    """Train a cell from a loss scale at which fp16 overflows; return the scales of its steps."""
    plain, steps = cell.recipe, 10
    deepspeed = plain.strategy.deepspeed | {"fp16": {"enabled": True, "initial_scale_power": HIGH, "hysteresis": 1}}
    changes = {"run": {"precision": "fp16", "steps": steps}, "strategy": {"deepspeed": deepspeed}}
    recipe = plain.model_copy(update={k: getattr(plain, k).model_copy(update=v) for k, v in changes.items()})
    scales = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            scales.append(trainer.strategy.gradient_scale)

    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(recipe, Path(folder))
        trainer.callbacks = [Note()]
        trainer.fit(module := MtpLightningModule(recipe), datamodule=RandomData(recipe, Ranks()))
    return scales, module.skipped_steps.total


def main(cells):
    """Train every cell."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    CPU_Accelerator.is_fp16_supported = lambda self: True
    device._check_cpu = lambda recipe: None
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    place = rank_from_env(os.environ)
    base = Cell(
        stage="zero1", ranks=place.num_ranks, backward_order="sequential", accumulation=2, heads="parallel",
        unembedding="shared", clips=True,
    )  # fmt: skip
    with process_group(base.recipe):
        outcomes = {}
        for cell in cells.split(","):
            stage, precision, optimizer, parameters = cell.split(":")
            if precision == "overflow":
                outcomes[cell] = scales_found(replace(base, stage=stage))
                continue
            outcomes[cell] = outcome_of(replace(base, stage=stage), precision, optimizer, parameters)
    if place.rank == 0:
        print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # as `mtp` ends its ranks
