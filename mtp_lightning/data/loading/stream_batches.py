"""What a run reads of a stream: batches to train on, and rows that are kept for validation."""

import hashlib
import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch.utils.data import DataLoader

from mtp_lightning.data.loading.dataset import (
    Batch,
    RankSlices,
    as_it_is,
    leave_signals_to_the_parent,
    read_ahead,
    tensors_of,
)
from mtp_lightning.data.loading.stream_documents import StreamRows, TarDocuments, joined_rows, rows_of, tars_of
from mtp_lightning.data.sampling.windows import RowArrays, SequenceSource
from mtp_lightning.data.shards.manifest import Manifest
from mtp_lightning.data.shards.mapped import Integers
from mtp_lightning.errors import DataError, MtpError
from mtp_lightning.recipe.schema.root import Recipe


def stream_rows(recipe: Recipe, *, begin: str, rank: int, world_size: int) -> StreamRows:
    """Open the tars that one rank trains on.

    Raises:
        DataError: There is none, or fewer than ranks times loader processes: some would have nothing to read.
    """
    assert recipe.data.stream is not None, "a rule of the recipe"
    tars = tars_of(recipe.data.stream.train)
    readers = world_size * max(1, recipe.data.workers)
    if len(tars) < readers:
        raise DataError(
            f"data.stream.train must name a tar or more for each of {world_size} ranks x "
            f"{max(1, recipe.data.workers)} loader processes",
            f"{len(tars)} tars",
            "Split the tars, lower data.workers, or take fewer ranks",
        )
    return StreamRows(
        documents=TarDocuments.of(recipe),
        tars=tars,
        seq_len=recipe.data.seq_len,
        width_tokens=recipe.data.seq_len + recipe.heads.num_offsets,
        seed=recipe.run.seed,
        begin=begin,
        rank=rank,
        world_size=world_size,
    )


def stream_identity(recipe: Recipe) -> dict[str, Any]:
    """Return what a position of a stream is a position in: the names of its tars, whose content nobody knows."""
    assert recipe.data.stream is not None, "a rule of the recipe"
    names = "\n".join(recipe.data.stream.train)
    return {"fingerprint": f"stream {hashlib.sha256(names.encode()).hexdigest()}"}


@final
@dataclass(frozen=True, kw_only=True)
class StreamBatches:
    """One batch per optimizer step, without end; where to begin is asked when the first batch is."""

    rows: Callable[[], StreamRows]
    slices: Callable[[], RankSlices]  # whose lengths alone count here
    workers: int = 0
    pin_memory: bool = False

    def __iter__(self) -> Iterator[Batch]:
        rows = self._rows()
        if not self.workers:
            return read_ahead(lambda own: self._batch(rows, len(own)), iter(self.slices()))
        return (self._batch(rows, len(own)) for own in self.slices())

    def _rows(self) -> Generator[RowArrays | MtpError, None, None]:
        if not self.workers:
            yield from self.rows()
            return
        loader = DataLoader(
            self.rows(),
            batch_size=None,
            num_workers=self.workers,
            collate_fn=as_it_is,
            worker_init_fn=leave_signals_to_the_parent,
            multiprocessing_context="spawn",
            generator=torch.Generator(),
        )
        yield from loader

    def _batch(self, rows: Generator[RowArrays | MtpError, None, None], num_rows: int) -> Batch:
        batch: list[RowArrays] = []
        for row in itertools.islice(rows, num_rows):
            if isinstance(row, MtpError):
                rows.close()  # ends its loader processes: while the error is on its way they would be waited for
                raise row
            batch.append(row)
        return tensors_of(joined_rows(batch), pin_memory=self.pin_memory)


@final
class CachedValidationSet(SequenceSource):
    """The first rows of the held-out tars, in memory."""

    split = "validation"

    def __init__(self, recipe: Recipe) -> None:
        """Read as many rows as a validation takes, or as there are.

        Raises:
            DataError: A tar cannot be read, or there is not one row.
        """
        assert recipe.data.stream is not None, "a rule of the recipe"
        self.width_tokens = recipe.data.seq_len + recipe.heads.num_offsets
        tars = tars_of(recipe.data.stream.validation)
        documents = itertools.chain.from_iterable(map(TarDocuments.of(recipe).read, tars))
        rows = rows_of(documents, seq_len=recipe.data.seq_len, width_tokens=self.width_tokens)
        self._rows = list(itertools.islice(rows, recipe.run.validation_samples))
        if not self._rows:
            raise DataError(
                f"data.stream.validation must have the T + n = {self.width_tokens} tokens of one row",
                f"fewer in {', '.join(tars)}",
                "Add tars, or lower data.seq_len",
            )

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    @property
    def manifests(self) -> list[Manifest]:
        """Nothing: plain tars have none."""
        return []

    def read(self, rows: Integers) -> RowArrays:
        """Return rows."""
        self.refuse_outside(rows)
        return joined_rows([self._rows[row] for row in rows.tolist()])

    def describe(self, row: int) -> str:
        """Return the place of a row in words."""
        return f"row {row:,} of data.stream.validation"

    def place(self, row: int, position: int) -> str:
        """Return the place of a token in words."""
        return f"{self.describe(row)}, token {position:,}"
