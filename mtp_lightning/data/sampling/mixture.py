"""Several sources mixed by integer quotas in blocks of fixed length: exact weights, and no random draws."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from mtp_lightning.data.sampling.order import Numbers, Order, permute
from mtp_lightning.data.sampling.windows import RowArrays, SequenceSource
from mtp_lightning.data.shards.manifest import Manifest
from mtp_lightning.data.shards.mapped import Integers
from mtp_lightning.recipe.schema.data import MIXTURE_BLOCK_ROWS

MIXTURE = "mixture 1"


def quotas_of(weights: Sequence[float], total: int) -> list[int]:
    """Divide a number of rows by weights: every part is its exact share, rounded down or up, and they add up.

    >>> quotas_of([1, 1, 1], 4096)
    [1366, 1365, 1365]
    """
    exact = np.array(weights, dtype=np.float64) / sum(weights) * total
    parts = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(parts - exact, kind="stable")  # the largest remainder first
    parts[by_remainder[: total - parts.sum()]] += 1
    return [int(part) for part in parts]


@final
@dataclass(frozen=True, kw_only=True)
class MixedOrder(Order):
    """The sources' own orders, interleaved: every block of `MIXTURE_BLOCK_ROWS` samples holds each one's quota.

    Source s delivers its sample number b * quota + r as the r-th of its rows of block b, so how far each source is
    at sample i is arithmetic. Within a block, which sample is whose is a keyed permutation.
    """

    seed: int
    quotas: tuple[int, ...]  # rows per block, one per source
    orders: tuple[Order, ...]
    sizes: tuple[int, ...]  # rows of each source

    def rows(self, samples: Numbers) -> Numbers:
        """Return the row of each sample; rows are numbered through all sources, one source after another."""
        sources, numbers = self.sources(samples)
        rows = np.empty_like(samples)
        first = 0
        for source, (order, size) in enumerate(zip(self.orders, self.sizes, strict=True)):
            inside = sources == source
            rows[inside] = first + order.rows(numbers[inside])
            first += size
        return rows

    def lookahead(self, sample: int) -> Numbers | None:
        """Return rows out of all shards that are read at a sample and for a while after it."""
        if self.orders[0].lookahead(0) is None:
            return None
        firsts = np.cumsum([0, *self.sizes])
        block = sample // MIXTURE_BLOCK_ROWS  # whose rows of one source come in any order
        parts = [order.lookahead(block * quota) for order, quota in zip(self.orders, self.quotas, strict=True)]
        return np.concatenate([first + part for first, part in zip(firsts, parts, strict=False) if part is not None])

    def sources(self, samples: Numbers) -> tuple[Numbers, Numbers]:
        """Return for each sample its source, and its number among the samples of that source."""
        blocks = samples // MIXTURE_BLOCK_ROWS
        places = np.empty_like(samples)
        for block in np.unique(blocks):
            inside = blocks == block
            places[inside] = permute(
                samples[inside] % MIXTURE_BLOCK_ROWS,
                seed=self.seed,
                epoch=int(block),
                size=MIXTURE_BLOCK_ROWS,
                purpose=MIXTURE,
            )
        ends = np.cumsum(self.quotas)
        sources = np.searchsorted(ends, places, side="right")
        quotas = np.array(self.quotas)[sources]
        return sources, blocks * quotas + places - (ends[sources] - quotas)

    def samples_taken(self, num_samples: int) -> list[int]:
        """Return how many of the first so many samples each source delivers."""
        num_blocks = num_samples // MIXTURE_BLOCK_ROWS
        begun = self.sources(np.arange(num_blocks * MIXTURE_BLOCK_ROWS, num_samples))[0]
        of_begun = np.bincount(begun, minlength=len(self.quotas))
        return [num_blocks * quota + int(count) for quota, count in zip(self.quotas, of_begun, strict=True)]


@final
class JoinedRows(SequenceSource):
    """The rows of several sources, numbered one source after another."""

    def __init__(self, sources: Sequence[SequenceSource], weights: Sequence[float], names: Sequence[str]) -> None:
        """Join sources of the same split and width; the weights serve to spread rows over them."""
        self.source_names = tuple(names)
        self.split = sources[0].split
        self.width_tokens = sources[0].width_tokens
        self._sources = sources
        self._weights = weights
        self._first_rows = np.concatenate([[0], np.cumsum([len(source) for source in sources])])

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._first_rows[-1])

    @property
    def manifests(self) -> list[Manifest]:
        """What the folders of all sources hold."""
        return [manifest for source in self._sources for manifest in source.manifests]

    def sources(self, rows: Integers) -> Integers:
        """Return for each row the source that it comes from."""
        return np.searchsorted(self._first_rows, rows, side="right") - 1

    def read(self, rows: Integers) -> RowArrays:
        """Read rows; where one source has a mask, the others' tokens are all targets."""
        self.refuse_outside(rows)
        sources = self.sources(rows)
        parts = {}
        for source in np.unique(sources):
            inside = np.flatnonzero(sources == source)
            parts[int(source)] = (inside, self._sources[source].read(rows[inside] - self._first_rows[source]))
        shape = (rows.size, self.width_tokens)
        types: dict[str, list[Any]] = {}
        for _, part in parts.values():
            for name, array in part.items():
                types.setdefault(name, []).append(array.dtype)
        batch: RowArrays = {name: np.ones(shape, dtype=np.result_type(*own)) for name, own in types.items()}
        for inside, part in parts.values():
            for name, array in part.items():
                batch[name][inside] = array
        return batch

    def fetch_ahead(self, rows: Integers | None) -> None:
        """Begin to fetch what the sources lack."""
        ends = self._first_rows[1:]
        whose = None if rows is None else np.searchsorted(ends, rows, side="right")
        for number, (source, first) in enumerate(zip(self._sources, self._first_rows, strict=False)):
            source.fetch_ahead(None if rows is None else rows[whose == number] - first)

    def describe(self, row: int) -> str:
        """Return the source of a row and its place there."""
        source, inside = self._locate(row)
        return f"source {source + 1} of {len(self._sources)}: {self._sources[source].describe(inside)}"

    def place(self, row: int, position: int) -> str:
        """Return the place of one token of a row in words; the file tells the source."""
        source, inside = self._locate(row)
        return self._sources[source].place(inside, position)

    def _locate(self, row: int) -> tuple[int, int]:
        source = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return source, row - int(self._first_rows[source])

    def spread(self, num_rows: int) -> Integers:
        """Return the numbers of so many rows: of each source by its weight, evenly; what one lacks others give."""
        sizes = np.array([len(source) for source in self._sources])
        taken = np.zeros_like(sizes)
        while missing := num_rows - int(taken.sum()):
            open_sources = np.flatnonzero(taken < sizes)
            shares = quotas_of([self._weights[int(source)] for source in open_sources], missing)
            taken[open_sources] = np.minimum(sizes[open_sources], taken[open_sources] + shares)
        spreads = zip(self._sources, self._first_rows, taken, strict=False)
        return np.concatenate([first + source.spread(int(count)) for source, first, count in spreads if count])


def mixture_hash(fingerprints: Sequence[str], quotas: Sequence[int]) -> str:
    """Return a hash of what is mixed and in which shares."""
    parts = [f"{fingerprint} {quota}" for fingerprint, quota in zip(fingerprints, quotas, strict=True)]
    return hashlib.sha256("\n".join([MIXTURE, *parts]).encode()).hexdigest()
