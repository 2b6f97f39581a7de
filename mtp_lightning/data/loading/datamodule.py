"""The recipe's data as a Lightning data module; its whole position is the number of rows consumed."""

import itertools
from collections.abc import Mapping
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from lightning.pytorch import LightningDataModule

from mtp_lightning.console.progress import say
from mtp_lightning.data.loading.corpus import recipe_tokenizer
from mtp_lightning.data.loading.dataset import RankSlices, SampleDataset, TrainingBatches, ValidationBatches
from mtp_lightning.data.loading.factory import OpenData, open_data, open_rows, prepare_data
from mtp_lightning.data.loading.stream_batches import StreamBatches, stream_identity, stream_rows
from mtp_lightning.data.loading.stream_documents import StreamRows
from mtp_lightning.data.sampling.order import Range, with_skipped, without_skipped
from mtp_lightning.data.sampling.windows import RowArrays, SequenceSource
from mtp_lightning.errors import CheckpointError, DataError
from mtp_lightning.files.paths import is_url
from mtp_lightning.recipe.document_attention import attends_one_by_one
from mtp_lightning.recipe.loading.load import RecipeLike, as_recipe

STATE_VERSION = 1
MOST_SKIP_RANGES = 20  # so that the state stays below 1 KiB
MOST_LOOKED_AT = 1024  # rows that are read before training begins


@final
class MtpDataModule(LightningDataModule):
    """Feed one batch per optimizer step: `tokens` and `documents`, each (R, T+n) int64, R rows on this rank.

    Where some tokens may not be targets there is a `loss_mask` too, (R, T+n) bool, true for those that may; where
    documents are attended to one by one, `starts`, (R, M), as by `document_starts`.

    Sample i of a run is a pure function of (shards, seed, i). A step takes the next
    `batch.global_batch_size` samples (fewer at
    the beginning under `batch.ramp`), each rank a contiguous part of them, so neither ranks nor workers change what
    is learnt from. The position moves only by `advance`, after a step is complete: batches fetched ahead and never
    used are simply fetched again.

    A stream (`data.kind: webdataset_stream`) has no numbered samples: there the position only counts.
    """

    def __init__(self, recipe: RecipeLike) -> None:
        """Take a recipe, or the path of one."""
        super().__init__()
        self.recipe = as_recipe(recipe)
        self.rows_consumed = 0
        self._skip_ranges: tuple[Range, ...] = ()  # of samples, which are rows consumed and rows skipped

    @cached_property
    def training_data(self) -> OpenData:
        """Open the training split."""
        return open_data(self.recipe, "train")

    @property
    def training_rows(self) -> SequenceSource:
        """The rows of the training split."""
        return self.training_data.rows

    @cached_property
    def validation_samples(self) -> SequenceSource:
        """Open the held-out split."""
        return open_rows(self.recipe, "validation")

    def on_before_batch_transfer(self, batch: dict[str, torch.Tensor], dataloader_idx: int) -> dict[str, torch.Tensor]:
        """Find where documents begin, while the rows are on the host, if they are attended to one by one."""
        if self.trainer is not None and attends_one_by_one(self.recipe, self.trainer.strategy.root_device.type):
            batch["starts"] = document_starts(batch["documents"][:, : -self.recipe.heads.num_offsets])
        return batch

    def prepare_data(self) -> None:
        """Build what the recipe leaves to the run and is missing."""
        prepare_data(self.recipe)

    def setup(self, stage: str) -> None:
        """Open both splits and refuse what cannot be trained on.

        Raises:
            DataError: Shards are damaged or do not fit the recipe, or a global batch cannot be cut or filled.
        """
        self._check_batch()
        self._check_validation()
        self._check_sample()
        if self._is_first and not self._is_stream:
            self._say_unlearnt()

    def train_dataloader(self) -> TrainingBatches | StreamBatches:
        """Return this rank's part of every global batch, without end, from `rows_consumed` at first use."""
        workers = self.recipe.data.workers
        pin_memory = self.recipe.run.device != "cpu" and torch.cuda.is_available()
        if self._is_stream:
            return StreamBatches(rows=self._stream, slices=self._slices, workers=workers, pin_memory=pin_memory)
        dataset = SampleDataset(self.training_rows, self.training_data.order, self.recipe.model.vocab_size)
        return TrainingBatches(dataset=dataset, slices=self._slices, workers=workers, pin_memory=pin_memory)

    def val_dataloader(self) -> ValidationBatches:
        """Return this rank's part of rows that are spread evenly over the held-out split, in file order."""
        share = self._num_validation_rows // self._num_shares
        chosen = self.validation_samples.spread(self._num_validation_rows)
        return ValidationBatches(
            rows=self.validation_samples,
            numbers=chosen[self._share * share : (self._share + 1) * share],
            batch_rows=self.recipe.batch.micro_batch_size,
            vocab_size=self.recipe.model.vocab_size,
        )

    def describe_training(self) -> str:
        """Say in words how much there is to train on."""
        if self._is_stream:
            return f"a stream of {len(self._stream().tars):,} tars"
        return f"{len(self.training_rows):,} rows"

    @property
    def num_rows_read(self) -> int:
        """Return how many different rows a run reads at most, over all ranks, held-out ones included."""
        samples = self.recipe.batch.samples_after(self.recipe.run.steps)
        return self._num_validation_rows + (samples if self._is_stream else min(samples, len(self.training_rows)))

    def advance(self, rows: int) -> None:
        """Count the rows of a completed optimizer step, over all ranks."""
        self.rows_consumed += rows

    def skip_rows(self, first: int, count: int) -> None:
        """Leave out rows that lie ahead: those that would be the `first` to be consumed and the `count` - 1 after it.

        For going back behind a window that did harm: resume from before it, skip it, train on. Takes effect when
        batches are next asked for from the beginning; row `first` then means the one that came after.

        Raises:
            DataError: The rows are behind the position, or the state would grow beyond bounds.
        """
        if first < self.rows_consumed or count < 1:
            raise DataError(
                f"rows to be skipped must lie ahead, from {self.rows_consumed:,} on",
                f"{count:,} from {first:,} on",
                "Resume from an earlier checkpoint first",
            )
        begin, last = without_skipped(np.array([first, first + count - 1]), self._skip_ranges).tolist()
        ranges = with_skipped(self._skip_ranges, begin, last + 1)
        if len(ranges) > MOST_SKIP_RANGES:
            raise DataError(
                f"at most {MOST_SKIP_RANGES} ranges of rows can be skipped",
                f"{len(ranges)}",
                "Look for the reason instead: so many harmful windows are not bad luck",
            )
        self._skip_ranges = tuple(ranges)

    def go_on_from(self, state: Mapping[str, Any]) -> None:
        """Take up another run's position, whose rows may be of other offsets or shards; skipped rows if they are not.

        Raises:
            CheckpointError: The position is none.
        """
        self.rows_consumed = _rows_consumed_of(state)
        if all(state.get(key) == value for key, value in self._identity().items()):
            self._skip_ranges = _skip_ranges_of(state)

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what it is a position in; below 1 KiB."""
        skipped = [list(own) for own in self._skip_ranges]
        return {**self._identity(), "rows_consumed": self.rows_consumed, "skip_ranges": skipped}

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
        self.rows_consumed = _rows_consumed_of(state_dict)
        self._skip_ranges = _skip_ranges_of(state_dict)

    def _identity(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            **(stream_identity(self.recipe) if self._is_stream else self.training_data.identity),
            "seq_len": self.recipe.data.seq_len,
            "num_offsets": self.recipe.heads.num_offsets,
            "seed": self.recipe.run.seed,
        }

    @property
    def _is_stream(self) -> bool:
        return self.recipe.data.kind == "webdataset_stream"

    def _stream(self) -> StreamRows:
        """Open the tars; where they begin depends on the position, so that a restart does not repeat its start."""
        num_skipped = sum(end - begin for begin, end in self._skip_ranges)
        begin = f"{self.rows_consumed} rows, {num_skipped} skipped"
        return stream_rows(self.recipe, begin=begin, rank=self._share, world_size=self._num_shares)

    @property
    def _is_first(self) -> bool:
        return not self.trainer or self.trainer.global_rank == 0

    @property
    def _share(self) -> int:
        """Number of the part of the rows that this rank reads: ranks that share windows read the same."""
        return self.trainer.global_rank // self.recipe.strategy.sequence_parallel if self.trainer else 0

    @property
    def _num_shares(self) -> int:
        return self.trainer.world_size // self.recipe.strategy.sequence_parallel if self.trainer else 1

    @property
    def _num_validation_rows(self) -> int:
        """Return how many held-out rows are scored, over all ranks: no more than asked for, equally many on each."""
        rows = min(self.recipe.run.validation_samples, len(self.validation_samples))
        return rows - rows % self._num_shares

    def _slices(self) -> RankSlices:
        return RankSlices(
            rows_consumed=self.rows_consumed,
            skip_ranges=self._skip_ranges,
            batch=self.recipe.batch,
            rank=self._share,
            world_size=self._num_shares,
        )

    def _check_batch(self) -> None:
        rows, first = self.recipe.batch.global_batch_size, self.recipe.batch.batch_size_at(0)
        name = "batch.global_batch_size" if first == rows else "batch.ramp.from_batch_size"
        shares, slices = self._num_shares, self.recipe.strategy.sequence_parallel
        if first % shares:
            over = f" / strategy.sequence_parallel={slices}" if slices > 1 else ""
            raise DataError(
                f"{name} must be a multiple of the number of ranks{over}, {shares}",
                str(first),
                f"Set {name}={-(-first // shares) * shares}, or change the number of ranks",
            )
        if self._is_stream:
            self._stream()
        elif rows > len(self.training_rows):
            raise DataError(
                f"the training split must have the batch.global_batch_size = {rows:,} rows of one step",
                f"{len(self.training_rows):,} rows of {self.training_rows.width_tokens:,} tokens",
                "Add documents, or lower batch.global_batch_size or data.seq_len",
            )

    def _check_validation(self) -> None:
        asked, there = self.recipe.run.validation_samples, self._num_validation_rows
        if there == 0:
            raise DataError(
                f"validation must have at least one row for each of {self._num_shares} ranks",
                f"{asked:,} asked for by run.validation_samples and {len(self.validation_samples):,} held out",
                "Raise run.validation_samples or data.validation_fraction, or use fewer ranks",
            )
        if there < asked and self._is_first:
            held_out = f"{len(self.validation_samples):,} are held out"
            say(f"validating on {there:,} rows, not {asked:,}: {held_out}", stderr=True)

    def _check_sample(self) -> None:
        """Refuse a prompt that leaves no room for what is to be written when the run has ended."""
        prompt, room = self.recipe.run.sample, self.recipe.model.max_position_embeddings
        num_tokens = len(recipe_tokenizer(self.recipe).encode(prompt.encode())) if prompt is not None else 0
        if num_tokens >= room:
            raise DataError(
                f"run.sample must leave room in the {room:,} positions of the model (model.max_position_embeddings)",
                f"a prompt of {num_tokens:,} tokens",
                "Shorten run.sample, or raise model.max_position_embeddings",
            )

    def _say_unlearnt(self) -> None:
        """Say how many of the first global batches have no token to learn, as a mask may leave none in long prompts."""
        sources = filter(None, (self.recipe.data.shards, *self.recipe.data.mixture))
        is_masked = any(manifest.is_masked("train") for manifest in self.training_rows.manifests)
        if not is_masked or any(map(is_url, sources)):  # rows behind a URL would all be fetched first
            return
        dataset = SampleDataset(self.training_rows, self.training_data.order, self.recipe.model.vocab_size)
        slices = iter(RankSlices(rows_consumed=0, batch=self.recipe.batch, rank=0, world_size=1))
        count = max(1, min(MOST_LOOKED_AT // self.recipe.batch.global_batch_size, self.recipe.run.steps))
        unlearnt = sum(not _has_target(dataset.read(samples)) for samples in itertools.islice(slices, count))
        if unlearnt:
            say(
                f"{unlearnt:,} of the first {count:,} global batches have no token to learn: their steps are skipped. "
                "Raise batch.global_batch_size or data.seq_len to have fewer",
                stderr=True,
            )


def _has_target(batch: RowArrays) -> bool:
    """Tell whether any token is to be predicted from one of its document before it."""
    documents, learnt = batch["documents"], batch.get("loss_mask")
    is_inside = documents[:, 1:] == documents[:, :-1]
    return bool((is_inside if learnt is None else is_inside & learnt[:, 1:]).any())


def _rows_consumed_of(state: Mapping[str, Any]) -> int:
    consumed = state.get("rows_consumed")
    if type(consumed) is not int or consumed < 0:
        raise CheckpointError(
            "rows_consumed of a checkpoint must be a count", repr(consumed), "Resume from another checkpoint"
        )
    return consumed


def _skip_ranges_of(state: Mapping[str, Any]) -> tuple[Range, ...]:
    """Read the ranges of a state; states from before there were any have none."""
    given = state.get("skip_ranges", [])
    is_list_of_pairs = isinstance(given, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in given)
    bounds: list[Any] = [bound for pair in given for bound in pair] if is_list_of_pairs else [None]
    is_growing = all(type(bound) is int for bound in bounds) and all(a < b for a, b in itertools.pairwise(bounds))
    if not is_growing:
        raise CheckpointError(
            "skip_ranges of a checkpoint must be pairs of growing sample numbers", repr(given), "Resume from another"
        )
    return tuple((begin, end) for begin, end in given)


def _spelled(state: dict[str, Any], keys: list[str]) -> str:
    return ", ".join(f"{key} = {state.get(key)}" for key in keys)


def document_starts(documents: torch.Tensor) -> torch.Tensor:
    """Find where the documents of each row begin, (B, T) -> (B, M); rows of fewer than M end in empty ones at T.

    On the host, before the rows go to a GPU: M is a shape, which a GPU would have to be waited for.
    """
    num_positions = documents.shape[1]
    is_start = torch.ones_like(documents, dtype=torch.bool)
    is_start[:, 1:] = documents[:, 1:] != documents[:, :-1]
    index = torch.arange(num_positions, device=documents.device)
    most = int(is_start.sum(1).max())
    return torch.where(is_start, index, num_positions).sort(1).values[:, :most]
