"""Weights of another model at the beginning of a run, and parts of it that must stay as they are."""

import hashlib
from pathlib import Path
from typing import cast, final

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mtp_lightning.checkpoint.layout import check_digests
from mtp_lightning.checkpoint.loading import find_checkpoint, model_files
from mtp_lightning.checkpoint.manifest import RECIPE_NAME
from mtp_lightning.checkpoint.shard_reader import ShardReader
from mtp_lightning.errors import CheckpointError, TrainingError
from mtp_lightning.recipe import Recipe, load_recipe
from mtp_lightning.recipe.rule import value_at
from mtp_lightning.training.fragments import check_names
from mtp_lightning.training.strategy import RunStrategy

SAME_FIELDS = (
    "model.num_attention_heads",
    "model.num_key_value_heads",
    "model.rope_theta",
    "model.rope_scaling",
    "model.rotary_share",
    "model.parallel_residual",
    "model.norm_eps",
    "heads.kind",
    "heads.order",
    "heads.hidden",
    "heads.concatenation",
    "data.attention",
)
"""Fields that change what the same weights compute."""


@final
class StartFrom(Callback):
    """Fill a new run with the weights of `run.start_from`; a run that has a checkpoint goes on from that instead."""

    def __init__(self, recipe: Recipe, path: Path) -> None:
        self._recipe, self._path = recipe, path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the weights, on every rank its part.

        Raises:
            CheckpointError: They are not there, damaged, or not those of the recipe's model.
        """
        if trainer.global_step:
            return
        strategy = cast(RunStrategy, trainer.strategy)
        with strategy.ranks.agreeing():
            folder = find_checkpoint(self._path)
            if strategy.ranks.is_first:
                check_digests(folder, model_files(folder))
                print(f"Starting from the weights of {folder}", flush=True)
            reader = ShardReader(folder)
            self._check(folder, reader, strategy)
        strategy.fill(reader)

    def _check(self, folder: Path, reader: ShardReader, strategy: RunStrategy) -> None:
        theirs = load_recipe(folder / RECIPE_NAME).recipe
        pairs = {field: (value_at(theirs, field), value_at(self._recipe, field)) for field in SAME_FIELDS}
        found = "; ".join(f"{field} {a} there and {b} here" for field, (a, b) in pairs.items() if a != b)
        if not found:
            try:
                check_names(reader, strategy.named_parameters())
                return
            except CheckpointError as error:
                found = error.found
        raise CheckpointError(
            "run.start_from must name a model with the parameters and the architecture of this recipe",
            f"{found}, in {folder}",
            f"Take sections model and heads from {folder / RECIPE_NAME}, or leave run.start_from out",
        )


@final
class Frozen(Callback):
    """Compare what is frozen at the end of training with what it was at the start, byte for byte."""

    def __init__(self) -> None:
        self._digest = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the frozen parameters are."""
        self._digest = _frozen_digest(cast(RunStrategy, trainer.strategy))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare, before the last checkpoint is written.

        Raises:
            TrainingError: A frozen parameter has changed on some rank.
        """
        strategy = cast(RunStrategy, trainer.strategy)
        if strategy.ranks.any(_frozen_digest(strategy) != self._digest):
            raise TrainingError(
                "frozen parameters must be the same bytes after training as before",
                "others",
                "Use the checkpoint that the run started from, and report the strategy and the head kind.",
            )


def _frozen_digest(strategy: RunStrategy) -> str:
    """Digest of this rank's part of all frozen parameters."""
    digest = hashlib.sha256()
    for fragment in strategy.fragments():
        if not fragment.is_trainable:
            digest.update(fragment.name.encode())
            digest.update(fragment.weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
