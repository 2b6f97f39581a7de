"""From a recipe to what a run reads: rows of one folder or of a mixture, and the order of the samples."""

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_lightning.data.build import describe
from mtp_lightning.data.corpus import check_manifest, prepare_shards, shards_folder
from mtp_lightning.data.manifest import SPLITS, Split, load_manifest
from mtp_lightning.data.mixture import JoinedRows, MixedOrder, mixture_hash, quotas_of
from mtp_lightning.data.order import Order, ShuffledOrder
from mtp_lightning.data.packing import PackedRows, prepare_plan
from mtp_lightning.data.progress import say
from mtp_lightning.data.rows import Rows, RowSource
from mtp_lightning.errors import DataError
from mtp_lightning.recipe.data_sections import MIXTURE_BLOCK_ROWS
from mtp_lightning.recipe.sections import Recipe


@dataclass(frozen=True)
class OpenData:
    """The rows of a split, and which of them each sample reads."""

    rows: RowSource
    order: Order
    identity: dict[str, Any]  # what a position in the order is a position in


@dataclass(frozen=True)
class _Source:
    name: str
    rows: RowSource
    weight: float

    @property
    def fingerprint(self) -> str:
        return self.rows.manifests[0].fingerprint


def prepare_data(recipe: Recipe) -> None:
    """Build what the recipe leaves to the run, shards and packing plans, and say what is used.

    Raises:
        DataError: Something cannot be built, or what is there cannot be used.
    """
    if recipe.data.mixture:
        folders = [Path(name).expanduser() for name in recipe.data.mixture]
        for folder in folders:
            say(f"using shards {folder}: {describe(load_manifest(folder))}")
    else:
        folders = [prepare_shards(recipe)]
    if recipe.data.packing == "best_fit":
        for folder in folders:
            for split in SPLITS:
                prepare_plan(folder, split, _cache(recipe), **_shape(recipe))


def open_data(recipe: Recipe, split: Split) -> OpenData:
    """Open the rows of a split as the recipe wants them, and check that they fit its tokenizer and model.

    Raises:
        DataError: Shards are missing, damaged, too short, of another tokenizer, or hold ids that the model lacks; a
            mixture names the same shards twice, or asks more of a source than it has.
    """
    if recipe.data.mixture:
        return _open_mixture(recipe, split)
    rows = _open_folder(recipe, shards_folder(recipe), split)
    order = ShuffledOrder(seed=recipe.run.seed, num_rows=len(rows))
    return OpenData(rows, order, _identity(recipe, rows.manifests[0].fingerprint))


def open_rows(recipe: Recipe, split: Split) -> RowSource:
    """Open the rows of a split; see `open_data`."""
    return open_data(recipe, split).rows


def _open_mixture(recipe: Recipe, split: Split) -> OpenData:
    sources = [
        _Source(name, _open_folder(recipe, Path(name).expanduser(), split), weight)
        for name, weight in recipe.data.mixture.items()
    ]
    sources.sort(key=lambda source: source.fingerprint)  # neither names nor their order decide what is read
    _refuse_twins(sources)
    weights = [source.weight for source in sources]
    order = MixedOrder(
        seed=recipe.run.seed,
        quotas=tuple(quotas_of(weights, MIXTURE_BLOCK_ROWS)),
        orders=tuple(
            ShuffledOrder(seed=recipe.run.seed, num_rows=len(source.rows), purpose=f"rows of source {number}")
            for number, source in enumerate(sources)
        ),
        sizes=tuple(len(source.rows) for source in sources),
    )
    if split == "train":
        _check_quotas(recipe, sources, order)
    fingerprints = [source.fingerprint for source in sources]
    identity = _identity(recipe, hashlib.sha256("\n".join(fingerprints).encode()).hexdigest())
    rows = JoinedRows([source.rows for source in sources], weights)
    return OpenData(rows, order, {**identity, "mixture": mixture_hash(fingerprints, order.quotas)})


def _open_folder(recipe: Recipe, folder: Path, split: Split) -> RowSource:
    rows: RowSource
    if recipe.data.packing == "best_fit":
        rows = PackedRows(folder, split, _cache(recipe), **_shape(recipe))
    else:
        rows = Rows(folder, split, **_shape(recipe))
    check_manifest(recipe, rows.manifests[0], folder)
    return rows


def _identity(recipe: Recipe, fingerprint: str) -> dict[str, Any]:
    """Return what decides the rows besides n, T and the seed; states from before a field existed lack it."""
    packing = recipe.data.packing
    return {"fingerprint": fingerprint, "mixture": None, "packing": None if packing == "cut" else packing}


def _refuse_twins(sources: list[_Source]) -> None:
    for one, other in itertools.pairwise(sources):
        if one.fingerprint == other.fingerprint:
            raise DataError(
                "the sources of data.mixture must be different shards",
                f"the same in {one.name} and {other.name}",
                "Name them once, with the sum of their weights",
            )


def _check_quotas(recipe: Recipe, sources: list[_Source], order: MixedOrder) -> None:
    """Refuse a source that lacks the rows of one block, or that the run would read more often than it may."""
    taken = order.samples_taken(recipe.batch.rows_after(recipe.run.steps))
    for source, quota, num_taken in zip(sources, order.quotas, taken, strict=True):
        num_rows = len(source.rows)
        if num_rows < quota:
            raise DataError(
                f"a source must have its share of {MIXTURE_BLOCK_ROWS:,} rows, {quota:,} for {source.name}",
                f"{num_rows:,} rows",
                "Lower its weight in data.mixture, lower data.window_tokens, or add documents",
            )
        most = recipe.data.mixture_epochs.get(source.name)
        if most is not None and num_taken > most * num_rows:
            raise DataError(
                f"a run must read {source.name} at most {most:g} times, as data.mixture_epochs says",
                f"{num_taken / num_rows:.2f} times: {num_taken:,} samples from {num_rows:,} rows",
                "Lower its weight in data.mixture or run.steps, or raise its limit",
            )


def _shape(recipe: Recipe) -> dict[str, int]:
    return {"window_tokens": recipe.data.window_tokens, "num_offsets": recipe.heads.num_offsets}


def _cache(recipe: Recipe) -> Path:
    return Path(recipe.run.cache).expanduser()
