"""Several sources mixed by integer quotas in blocks of fixed length: exact weights, and no random draws."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import numpy as np

from mtp_lightning.data.sampling.order import Numbers, Order, permute
from mtp_lightning.data.sampling.windows import RowArrays, SequenceSource
from mtp_lightning.data.shards.manifest import Manifest
from mtp_lightning.data.shards.mapped import Integers
from mtp_lightning.recipe.schema.data import MIXTURE_BLOCK_ROWS

MIXTURE = "mixture 1"
PLANNED = "mixture 1, planned"
LEAST_BLOCK_ROWS = 64
MOST_BLOCKS = 1 << 16
GOLDEN_RATIO = (5**0.5 - 1) / 2  # whose multiples fall evenly between 0 and 1


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


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The first samples of a mixture whose weights change: blocks of equal length, each with quotas of its own."""

    block_rows: int
    quotas: Numbers  # (blocks, sources)

    @cached_property
    def before(self) -> Numbers:
        """Rows that each source delivers before each block, and before what follows: (blocks + 1, sources)."""
        return np.concatenate([np.zeros_like(self.quotas[:1]), np.cumsum(self.quotas, axis=0)])

    @property
    def num_samples(self) -> int:
        """Samples in all blocks."""
        return self.block_rows * len(self.quotas)


def plan_blocks(rows: Sequence[int], weights: Sequence[Sequence[float]], *, is_linear: bool) -> Planned:
    """Plan the blocks up to the last of the rows at which weights are given, for every source.

    A source's share of a block is that of the integral of its weight over it. Where that is no whole number of rows it
    is rounded, up or down in turn, so that over many blocks the shares are kept to a few rows.

    Args:
        rows: rows consumed, growing.
        weights: at each of them, of each source; before the first and after the last row they stay.
        is_linear: whether weights change evenly in between, not at once at the next of the rows.
    """
    block_rows = max(LEAST_BLOCK_ROWS, 1 << (rows[-1] // MOST_BLOCKS).bit_length())
    edges = block_rows * np.arange(-(-rows[-1] // block_rows) + 1)
    points, values = np.array([0, *rows], dtype=np.float64), np.array([weights[0], *weights], dtype=np.float64)
    if not is_linear:
        values /= values.sum(axis=1, keepdims=True)  # a block in which they change gets of each by its time
    ends = values[1:] if is_linear else values[:-1]  # to which a weight goes before the next of the rows
    sums = np.cumsum(np.diff(points)[:, None] * (values[:-1] + ends) / 2, axis=0)
    piece = np.searchsorted(points, edges, side="right") - 1
    past = (edges - points[piece])[:, None]
    following = np.minimum(piece + 1, len(points) - 1)
    width = np.maximum(points[following] - points[piece], 1)[:, None]
    slope = (values[following] - values[piece]) / width if is_linear else 0.0
    integrals = np.concatenate([np.zeros_like(sums[:1]), sums])[piece] + past * (values[piece] + slope * past / 2)
    parts = np.cumsum(np.diff(integrals, axis=0), axis=1)
    bounds = parts / parts[:, -1:] * block_rows
    phases = np.arange(len(bounds))[:, None] * GOLDEN_RATIO % 1
    whole: Numbers = np.floor(bounds + phases).astype(np.int64)
    whole[:, 1:] -= whole[:, :-1].copy()
    return Planned(block_rows=block_rows, quotas=whole)


@final
@dataclass(frozen=True, kw_only=True)
class MixedOrder(Order):
    """The sources' own orders, interleaved: every block of `MIXTURE_BLOCK_ROWS` samples holds each one's quota.

    Source s delivers its sample number b * quota + r as the r-th of its rows of block b, so how far each source is
    at sample i is arithmetic. Within a block, which sample is whose is a keyed permutation. Where weights change, the
    blocks up to the last change come first, with their own length and quotas.
    """

    seed: int
    quotas: tuple[int, ...]  # rows per block, one per source
    orders: tuple[Order, ...]
    sizes: tuple[int, ...]  # rows of each source
    planned: Planned | None = None

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
        before = self._block_of(sample)[1].tolist()  # rows of one source come in any order within a block
        parts = [order.lookahead(number) for order, number in zip(self.orders, before, strict=True)]
        return np.concatenate([first + part for first, part in zip(firsts, parts, strict=False) if part is not None])

    def sources(self, samples: Numbers) -> tuple[Numbers, Numbers]:
        """Return for each sample its source, and its number among the samples of that source."""
        sources, numbers = np.empty_like(samples), np.empty_like(samples)
        is_planned = samples < self._num_planned
        if self.planned is not None and is_planned.any():
            blocks = samples[is_planned] // self.planned.block_rows
            own = (self.planned.quotas[blocks], self.planned.before[blocks])
            places = self._places(samples[is_planned], self.planned.block_rows, PLANNED)
            sources[is_planned], numbers[is_planned] = _dealt(places, *own)
        later = samples[~is_planned] - self._num_planned
        before = self._before_later + (later // MIXTURE_BLOCK_ROWS)[:, None] * np.array(self.quotas)
        places = self._places(later, MIXTURE_BLOCK_ROWS, MIXTURE)
        sources[~is_planned], numbers[~is_planned] = _dealt(places, np.array([self.quotas]), before)
        return sources, numbers

    def samples_taken(self, num_samples: int) -> list[int]:
        """Return how many of the first so many samples each source delivers."""
        first, before = self._block_of(num_samples)
        begun = self.sources(np.arange(first, num_samples))[0]
        return [int(count) for count in before + np.bincount(begun, minlength=len(self.quotas))]

    @property
    def _num_planned(self) -> int:
        return self.planned.num_samples if self.planned else 0

    @property
    def _before_later(self) -> Numbers:
        return self.planned.before[-1] if self.planned else np.zeros(len(self.quotas), dtype=np.int64)

    def _block_of(self, sample: int) -> tuple[int, Numbers]:
        """Return the first sample of the block of a sample, and how many rows of each source come before it."""
        if self.planned is not None and sample < self._num_planned:
            block = sample // self.planned.block_rows
            return block * self.planned.block_rows, self.planned.before[block]
        block = (sample - self._num_planned) // MIXTURE_BLOCK_ROWS
        return self._num_planned + block * MIXTURE_BLOCK_ROWS, self._before_later + block * np.array(self.quotas)

    def _places(self, samples: Numbers, block_rows: int, purpose: str) -> Numbers:
        """Return the place of each sample in its block, shuffled there."""
        blocks = samples // block_rows
        places = np.empty_like(samples)
        for block in np.unique(blocks):
            inside = blocks == block
            own = samples[inside] % block_rows
            places[inside] = permute(own, seed=self.seed, epoch=int(block), size=block_rows, purpose=purpose)
        return places


def _dealt(places: Numbers, quotas: Numbers, before: Numbers) -> tuple[Numbers, Numbers]:
    """Give places in blocks to sources by their quotas there; return sources and the numbers of their rows."""
    ends = np.cumsum(quotas, axis=1)
    sources = (places[:, None] >= ends).sum(axis=1)
    lines, quota_lines = np.arange(places.size), np.arange(places.size) % len(quotas)
    first = (ends - quotas)[quota_lines, sources]
    return sources, before[lines, sources] + places - first


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


def mixture_hash(fingerprints: Sequence[str], order: MixedOrder) -> str:
    """Return a hash of what is mixed and in which shares."""
    parts = [f"{fingerprint} {quota}" for fingerprint, quota in zip(fingerprints, order.quotas, strict=True)]
    if order.planned is not None:
        parts += [f"{PLANNED} {order.planned.block_rows} {order.planned.quotas.tolist()}"]
    return hashlib.sha256("\n".join([MIXTURE, *parts]).encode()).hexdigest()
