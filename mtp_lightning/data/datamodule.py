"""The recipe's data as a Lightning data module; its whole position is the number of rows consumed."""

from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from mtp_lightning.data.corpus import open_rows, prepare_shards
from mtp_lightning.data.dataset import RankSlices, SampleDataset, TrainingBatches, ValidationBatches
from mtp_lightning.data.progress import say
from mtp_lightning.data.rows import Rows
from mtp_lightning.errors import CheckpointError, DataError
from mtp_lightning.recipe.sections import Recipe

STATE_VERSION = 1


@final
class MtpDataModule(LightningDataModule):
    """Feed one batch per optimizer step: `tokens` and `documents`, each (R, T+n) int64, R rows on this rank.

    Sample i of a run is a pure function of (shards, seed, i). A step takes the next `batch.rows` samples, each
    rank a contiguous part of them, so neither ranks nor workers change what is learnt from. The position moves
    only by `advance`, after a step is complete: batches fetched ahead and never used are simply fetched again.
    """

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self._recipe = recipe
        self.rows_consumed = 0

    @cached_property
    def training_rows(self) -> Rows:
        """Open the training split."""
        return open_rows(self._recipe, "train")

    @cached_property
    def validation_rows(self) -> Rows:
        """Open the held-out split."""
        return open_rows(self._recipe, "validation")

    def prepare_data(self) -> None:
        """Build the shards if the recipe leaves that to the run and they are missing."""
        prepare_shards(self._recipe)

    def setup(self, stage: str) -> None:
        """Open both splits and refuse what cannot be trained on.

        Raises:
            DataError: Shards are damaged or do not fit the recipe, or a global batch cannot be cut or filled.
        """
        self._check_batch()
        self._check_validation()

    def train_dataloader(self) -> TrainingBatches:
        """Return this rank's part of every global batch, without end, from `rows_consumed` at first use."""
        return TrainingBatches(
            dataset=SampleDataset(self.training_rows, seed=self._recipe.run.seed),
            slices=self._slices,
            vocabulary=self._recipe.model.vocabulary,
            workers=self._recipe.data.workers,
            pin_memory=self._recipe.run.device != "cpu" and torch.cuda.is_available(),
        )

    def val_dataloader(self) -> ValidationBatches:
        """Return this rank's part of rows that are spread evenly over the held-out split, in file order."""
        share = self._num_validation_rows // self._world_size
        chosen = np.arange(self._num_validation_rows) * len(self.validation_rows) // self._num_validation_rows
        return ValidationBatches(
            rows=self.validation_rows,
            numbers=chosen[self._rank * share : (self._rank + 1) * share],
            batch_rows=self._recipe.batch.micro_rows,
            vocabulary=self._recipe.model.vocabulary,
        )

    def advance(self, rows: int) -> None:
        """Count the rows of a completed optimizer step, over all ranks."""
        self.rows_consumed += rows

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what it is a position in."""
        return {**self._identity(), "rows_consumed": self.rows_consumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a position.

        Raises:
            CheckpointError: It belongs to other shards, windows or another seed, so it would name other rows.
        """
        own = self._identity()
        wrong = [key for key, value in own.items() if state_dict.get(key) != value]
        if wrong:
            raise CheckpointError(
                f"a run must go on with the data it began with: {_spelled(own, wrong)} in the recipe",
                f"{_spelled(state_dict, wrong)} in the checkpoint",
                "Give the recipe the values of the checkpoint, or start a new run",
            )
        consumed = state_dict.get("rows_consumed")
        if type(consumed) is not int or consumed < 0:
            raise CheckpointError(
                "rows_consumed of a checkpoint must be a count",
                repr(consumed),
                "Resume from another checkpoint",
            )
        self.rows_consumed = consumed

    def _identity(self) -> dict[str, int | str]:
        return {
            "version": STATE_VERSION,
            "fingerprint": self.training_rows.manifest.fingerprint,
            "window_tokens": self._recipe.data.window_tokens,
            "num_offsets": self._recipe.heads.num_offsets,
            "seed": self._recipe.run.seed,
        }

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _num_validation_rows(self) -> int:
        """Return how many held-out rows are scored, over all ranks: no more than asked for, equally many on each."""
        rows = min(self._recipe.run.validation_rows, len(self.validation_rows))
        return rows - rows % self._world_size

    def _slices(self) -> RankSlices:
        return RankSlices(
            first_sample=self.rows_consumed,
            batch_rows=self._recipe.batch.rows,
            rank=self._rank,
            world_size=self._world_size,
        )

    def _check_batch(self) -> None:
        rows = self._recipe.batch.rows
        if rows % self._world_size:
            raise DataError(
                f"batch.rows must be a multiple of the number of ranks, {self._world_size}",
                str(rows),
                f"Set batch.rows={-(-rows // self._world_size) * self._world_size}, or change the number of ranks",
            )
        if rows > len(self.training_rows):
            raise DataError(
                f"the training split must have the batch.rows = {rows:,} rows of one step",
                f"{len(self.training_rows):,} rows of {self.training_rows.width_tokens:,} tokens",
                "Add documents, or lower batch.rows or data.window_tokens",
            )

    def _check_validation(self) -> None:
        asked, there = self._recipe.run.validation_rows, self._num_validation_rows
        if there == 0:
            raise DataError(
                f"validation must have at least one row for each of {self._world_size} ranks",
                f"{asked:,} asked for by run.validation_rows and {len(self.validation_rows):,} held out",
                "Raise run.validation_rows or data.validation_share, or use fewer ranks",
            )
        if there < asked and self._rank == 0:
            say(f"validating on {there:,} rows, not {asked:,}: {len(self.validation_rows):,} are held out")


def _spelled(state: dict[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key} = {state.get(key)}" for key in keys)
