"""Batches for training and validation: sample numbers in, tensors out."""

import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mtp_lightning.data.corpus import check_largest_token
from mtp_lightning.data.mapped import Integers
from mtp_lightning.data.order import Order, Range, without_skipped
from mtp_lightning.data.rows import RowSource

Arrays = dict[str, Integers]
Batch = dict[str, torch.Tensor]


def tensors_of(arrays: Arrays, *, vocabulary: int, pin_memory: bool = False) -> Batch:
    """Return rows as tensors, each (B, T+n).

    Raises:
        DataError: A token id is not below the vocabulary.
    """
    check_largest_token(int(arrays["tokens"].max()), vocabulary, "a batch")
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return {name: tensor.pin_memory() for name, tensor in tensors.items()} if pin_memory else tensors


@final
class SampleDataset(Dataset[Arrays]):
    """The endless samples of a run, fetched by the batch; it holds no position, so copies of it agree.

    Fetches arrays and not tensors: arrays take no shared memory between processes, and a worker that ends while its
    sending thread is inside torch aborts (torch 2.13 on Python 3.11: "terminate called without an active exception").
    """

    def __init__(self, rows: RowSource, order: Order) -> None:
        self._rows = rows
        self._order = order

    def __getitem__(self, sample: int) -> Arrays:
        return self.__getitems__([sample])

    def __getitems__(self, samples: Sequence[int]) -> Arrays:
        return self._rows.read(self._order.rows(np.asarray(samples, dtype=np.int64)))


@final
@dataclass(frozen=True, kw_only=True)
class RankSlices:
    """Endless sample numbers of one rank: its contiguous part of every global batch."""

    rows_consumed: int
    batch_rows: int  # over all ranks
    rank: int
    world_size: int
    skip_ranges: tuple[Range, ...] = ()  # of samples, sorted and apart

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_rows // self.world_size
        first = self.rows_consumed + self.rank * share
        for begin in itertools.count(first, self.batch_rows):
            yield without_skipped(np.arange(begin, begin + share), self.skip_ranges).tolist()


@final
@dataclass(frozen=True, kw_only=True)
class TrainingBatches:
    """One batch per optimizer step, without end; where to begin is asked when the first batch is.

    No `DataLoader` to Lightning's eyes, so that it neither wraps the sampler per rank nor counts epochs.
    """

    dataset: SampleDataset
    slices: Callable[[], RankSlices]
    vocabulary: int
    workers: int = 0
    pin_memory: bool = False

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.slices(),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_the_parent,
            # A fork would copy CUDA's state, running threads and the run's signal handlers.
            multiprocessing_context="spawn" if self.workers else None,
            generator=torch.Generator(),  # else the loader draws a seed from the run's own random numbers
        )
        for arrays in loader:
            yield tensors_of(arrays, vocabulary=self.vocabulary, pin_memory=self.pin_memory)


@final
@dataclass(frozen=True, kw_only=True)
class ValidationBatches:
    """The same rows at every validation, in file order."""

    rows: RowSource
    numbers: Integers
    batch_rows: int
    vocabulary: int

    def __len__(self) -> int:
        return -(-self.numbers.size // self.batch_rows)

    def __iter__(self) -> Iterator[Batch]:
        for begin in range(0, self.numbers.size, self.batch_rows):
            arrays = self.rows.read(self.numbers[begin : begin + self.batch_rows])
            yield tensors_of(arrays, vocabulary=self.vocabulary)


def _as_it_is(batch: Any) -> Any:
    """Collate nothing: the data set has read a whole batch."""
    return batch


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignore what a terminal or Slurm sends to every process of a run; the parent ends its workers itself."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
