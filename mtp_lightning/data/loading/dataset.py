"""Batches for training and validation: sample numbers in, tensors out."""

import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from mtp_lightning.data.sampling.order import Order, Range, without_skipped
from mtp_lightning.data.sampling.windows import RowArrays, SequenceSource
from mtp_lightning.data.shards.mapped import Integers
from mtp_lightning.errors import MtpError
from mtp_lightning.launch.signals import STOP_SIGNALS
from mtp_lightning.recipe.schema.data import BatchSection

BATCHES_AHEAD = 2
Batch = dict[str, torch.Tensor]


def tensors_of(arrays: RowArrays, *, pin_memory: bool = False) -> Batch:
    """Return rows as tensors, each (B, T+n); whole numbers become int64, as torch wants indices."""
    tensors = {name: torch.from_numpy(_widened(array)) for name, array in arrays.items()}
    return {name: tensor.pin_memory() for name, tensor in tensors.items()} if pin_memory else tensors


@final
class SampleDataset(Dataset[RowArrays | MtpError]):
    """The endless samples of a run, fetched by the batch; it holds no position, so copies of it agree.

    Fetches arrays and not tensors: arrays take no shared memory between processes, and a worker that ends while its
    sending thread is inside torch aborts (torch 2.13 on Python 3.11: "terminate called without an active exception").
    """

    def __init__(self, rows: SequenceSource, order: Order, vocab_size: int) -> None:
        self._rows = rows
        self._order = order
        self._vocabulary = vocab_size

    def __getitem__(self, sample: int) -> RowArrays | MtpError:
        return self.__getitems__([sample])

    def __getitems__(self, samples: Sequence[int]) -> RowArrays | MtpError:
        """Read a batch where an exception would not arrive as what it is: in a loader process of torch."""
        try:
            return self.read(samples)
        except MtpError as error:
            return error

    def read(self, samples: Sequence[int]) -> RowArrays:
        """Read a batch.

        Raises:
            DataError: A shard is damaged, or was replaced, or holds an id that the model lacks.
        """
        if samples:
            self._rows.fetch_ahead(self._order.lookahead(samples[-1]))
        return self._rows.read_known(self._order.rows(np.asarray(samples, dtype=np.int64)), self._vocabulary)


@final
@dataclass(frozen=True, kw_only=True)
class RankSlices:
    """Endless sample numbers of one rank: its contiguous part of every global batch."""

    rows_consumed: int
    batch: BatchSection
    rank: int
    world_size: int
    skip_ranges: tuple[Range, ...] = ()  # of samples, sorted and apart

    def __iter__(self) -> Iterator[list[int]]:
        position = self.rows_consumed
        while True:
            rows = self.batch.batch_size_at(position)
            share = rows // self.world_size
            begin = position + self.rank * share
            yield without_skipped(np.arange(begin, begin + share), self.skip_ranges).tolist()
            position += rows


@final
@dataclass(frozen=True, kw_only=True)
class TrainingBatches:
    """One batch per optimizer step, without end; where to begin is asked when the first batch is.

    No `DataLoader` to Lightning's eyes, so that it neither wraps the sampler per rank nor counts epochs.
    """

    dataset: SampleDataset
    slices: Callable[[], RankSlices]
    workers: int = 0
    pin_memory: bool = False

    def __iter__(self) -> Iterator[Batch]:
        return self._from_workers() if self.workers else read_ahead(self._read, iter(self.slices()))

    def _read(self, samples: list[int]) -> Batch:
        return tensors_of(self.dataset.read(samples), pin_memory=self.pin_memory)

    def _from_workers(self) -> Iterator[Batch]:
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.slices(),
            num_workers=self.workers,
            collate_fn=as_it_is,
            worker_init_fn=leave_signals_to_the_parent,
            multiprocessing_context="spawn",  # a fork would copy CUDA's state, running threads and signal handlers
            generator=torch.Generator(),  # else the loader draws a seed from the run's own random numbers
        )
        for arrays in loader:
            if isinstance(arrays, MtpError):
                raise arrays
            yield tensors_of(arrays, pin_memory=self.pin_memory)


@final
@dataclass(frozen=True, kw_only=True)
class ValidationBatches:
    """The same rows at every validation, in file order; of a mixture also their `sources`, (B,) int64."""

    rows: SequenceSource
    numbers: Integers
    batch_rows: int
    vocab_size: int

    def __len__(self) -> int:
        return -(-self.numbers.size // self.batch_rows)

    def __iter__(self) -> Iterator[Batch]:
        for begin in range(0, self.numbers.size, self.batch_rows):
            numbers = self.numbers[begin : begin + self.batch_rows]
            batch = tensors_of(self.rows.read_known(numbers, self.vocab_size))
            yield batch | ({"sources": torch.from_numpy(self.rows.sources(numbers))} if self.rows.source_names else {})


def read_ahead(read: Callable[[list[int]], Batch], slices: Iterator[list[int]]) -> Iterator[Batch]:
    """Read the next batches in a thread while the model trains on this one."""
    reader = ThreadPoolExecutor(1, thread_name_prefix="mtp-rows")
    ahead: deque[Future[Batch]] = deque()
    try:
        while True:
            while len(ahead) <= BATCHES_AHEAD:
                ahead.append(reader.submit(read, next(slices)))
            yield ahead.popleft().result()
    finally:
        reader.shutdown(cancel_futures=True)


def leave_signals_to_the_parent(worker: int) -> None:
    """Ignore what a terminal or Slurm sends to every process of a run; the parent ends its workers itself."""
    for name in (signal.SIGINT, *STOP_SIGNALS):
        signal.signal(name, signal.SIG_IGN)


def _widened(array: NDArray[Any]) -> NDArray[Any]:
    return array if array.dtype == np.bool_ else array.astype(np.int64)


def as_it_is(batch: Any) -> Any:
    """Collate nothing: the data set has read a whole batch."""
    return batch
