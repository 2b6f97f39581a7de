"""From a recipe to what a run reads: rows of one folder or of a mixture, and the order of the samples."""

import hashlib
import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtp_lightning.console.progress import say
from mtp_lightning.data.loading.corpus import check_manifest, folder_of, prepare_named, prepare_shards, shards_folder
from mtp_lightning.data.loading.stream_batches import CachedValidationSet
from mtp_lightning.data.loading.stream_documents import tars_of
from mtp_lightning.data.sampling.mixture import JoinedRows, MixedOrder, mixture_hash, plan_blocks, quotas_of
from mtp_lightning.data.sampling.order import ROWS, Order, ShardLocalShuffle, ShuffledOrder
from mtp_lightning.data.sampling.packing import PackedRows, prepare_plan
from mtp_lightning.data.sampling.windows import SequenceSource, WindowDataset
from mtp_lightning.data.shards.cache import GIB, ShardCache
from mtp_lightning.data.shards.manifest import SPLITS, Manifest, Split
from mtp_lightning.errors import DataError
from mtp_lightning.files.paths import is_url
from mtp_lightning.recipe.schema.data import MIXTURE_BLOCK_ROWS
from mtp_lightning.recipe.schema.root import Recipe


@dataclass(frozen=True)
class OpenData:
    """The rows of a split, and which of them each sample reads."""

    rows: SequenceSource
    order: Order
    identity: dict[str, Any]  # what a position in the order is a position in


@dataclass(frozen=True)
class _Source:
    name: str
    rows: SequenceSource
    weights: list[float]  # at the rows of the schedule, if there is one

    @property
    def fingerprint(self) -> str:
        return self.rows.manifests[0].fingerprint


def prepare_data(recipe: Recipe) -> None:
    """Build what the recipe leaves to the run, shards and packing plans, fetch indexes, and say what is used.

    Raises:
        DataError: Something cannot be built, or what is there cannot be used.
    """
    if recipe.data.stream is not None:
        say(
            f"streaming {len(tars_of(recipe.data.stream.train)):,} tars; resume is not exact: a run that is started "
            "again reads them in another order, so some documents come again early and others late",
            stderr=True,
        )
        return
    if recipe.data.mixture:
        folders = [prepare_named(recipe, name) for name in recipe.data.mixture]
        _say_schedule(recipe)
    else:
        folders = [prepare_shards(recipe)]
    if recipe.data.packing == "best_fit":
        for folder in folders:
            for split in SPLITS:
                prepare_plan(folder, split, _cache(recipe), **_shape(recipe))


def _say_schedule(recipe: Recipe) -> None:
    schedule, weights = recipe.data.mixture_schedule, recipe.data.weights_at_rows()
    for number, row in enumerate(schedule.at_rows if schedule else []):
        at_row = {name: own[number] for name, own in weights.items()}
        shares = ", ".join(f"{weight / sum(at_row.values()):.1%} {name}" for name, weight in at_row.items())
        say(f"mixture from row {row:,}: {shares}", stderr=True)


def open_data(recipe: Recipe, split: Split) -> OpenData:
    """Open the rows of a split as the recipe wants them, and check that they fit its tokenizer and model.

    Raises:
        DataError: Shards are missing, damaged, too short, of another tokenizer, or hold ids that the model lacks; a
            mixture names the same shards twice, or asks more of a source than it has.
    """
    if recipe.data.stream is not None:
        return _open_stream(recipe, split)
    if recipe.data.mixture:
        return _open_mixture(recipe, split)
    name = recipe.data.shards or str(shards_folder(recipe))
    rows = _open_source(recipe, name, split)
    _check_cache(recipe, {name: rows})
    return OpenData(rows, _order_of(recipe, rows), _identity(recipe, rows.manifests[0].fingerprint))


def open_rows(recipe: Recipe, split: Split) -> SequenceSource:
    """Open the rows of a split; see `open_data`."""
    return open_data(recipe, split).rows


def _open_mixture(recipe: Recipe, split: Split) -> OpenData:
    sources = [
        _Source(name, _open_source(recipe, name, split), weights)
        for name, weights in recipe.data.weights_at_rows().items()
    ]
    sources.sort(key=lambda source: source.fingerprint)  # neither names nor their order decide what is read
    _refuse_twins(sources)
    _check_templates(sources)
    _check_cache(recipe, {source.name: source.rows for source in sources})
    weights, schedule = [source.weights[-1] for source in sources], recipe.data.mixture_schedule
    planned = None
    if schedule is not None and schedule.at_rows[-1] > 0:
        weights_at = list(zip(*(source.weights for source in sources), strict=True))
        planned = plan_blocks(schedule.at_rows, weights_at, is_linear=schedule.between == "linear")
    order = MixedOrder(
        seed=recipe.run.seed,
        quotas=tuple(quotas_of(weights, MIXTURE_BLOCK_ROWS)),
        orders=tuple(
            _order_of(recipe, source.rows, f"rows of source {number}") for number, source in enumerate(sources)
        ),
        sizes=tuple(len(source.rows) for source in sources),
        planned=planned,
    )
    if planned is not None:  # held-out rows are spread by what the schedule gives in all
        weights = np.maximum(1, planned.before[-1] + order.quotas).tolist()
    if split == "train":
        _check_epochs(recipe, sources, order)
    fingerprints = [source.fingerprint for source in sources]
    identity = _identity(recipe, hashlib.sha256("\n".join(fingerprints).encode()).hexdigest())
    rows = JoinedRows([source.rows for source in sources], weights, [source.name for source in sources])
    return OpenData(rows, order, {**identity, "mixture": mixture_hash(fingerprints, order)})


def _open_stream(recipe: Recipe, split: Split) -> OpenData:
    if split == "train":
        raise DataError(
            "rows must be numbered to be looked at one by one",
            "data.kind = webdataset_stream",
            "Look at split validation, or build shards of the text with `mtp data build`",
        )
    rows = CachedValidationSet(recipe)
    return OpenData(rows, ShuffledOrder(seed=recipe.run.seed, num_rows=len(rows)), {})


def _open_source(recipe: Recipe, name: str, split: Split) -> SequenceSource:
    folder = folder_of(recipe, name)
    rows: SequenceSource
    if recipe.data.packing == "best_fit":
        rows = PackedRows(folder, split, _cache(recipe), **_shape(recipe))
    else:
        rows = WindowDataset(folder, split, cache=shard_cache_of(recipe, name), **_shape(recipe))
    check_manifest(recipe, rows.manifests[0], folder)
    return rows


def shard_cache_of(recipe: Recipe, name: str) -> ShardCache | None:
    """Return where the shards of a URL are kept; None for a folder."""
    limit_bytes = int(recipe.data.cache_gib * GIB)
    return ShardCache(name, _cache(recipe) / "remote/shards", limit_bytes=limit_bytes) if is_url(name) else None


def _order_of(recipe: Recipe, rows: SequenceSource, purpose: str = ROWS) -> Order:
    if recipe.data.shuffle == "shards" and isinstance(rows, WindowDataset):
        shuffle_shards = recipe.data.shuffle_shards
        return ShardLocalShuffle(
            seed=recipe.run.seed, shard_rows=rows.shard_rows, shuffle_shards=shuffle_shards, purpose=purpose
        )
    return ShuffledOrder(seed=recipe.run.seed, num_rows=len(rows), purpose=purpose)


def _check_cache(recipe: Recipe, rows: dict[str, SequenceSource]) -> None:
    """Refuse a cache that shards from URLs would go in and out of all the time.

    Held-out shards are all read at every validation; of the others, all under order `rows`, else those of the present
    and the next group.
    """
    manifests = [source.manifests[0] for name, source in rows.items() if is_url(name)]
    all_bytes = sum(shard.num_bytes for manifest in manifests for shard in manifest.shards)
    group_bytes = sum(_group_bytes(manifest, recipe.data.shuffle_shards) for manifest in manifests)
    needed, has = (all_bytes if recipe.data.shuffle == "rows" else group_bytes) / GIB, recipe.data.cache_gib
    if needed <= has:
        return
    if recipe.data.shuffle == "rows":
        other = f"or data.shuffle=shards, for which {_rounded_up(group_bytes / GIB)} are enough"
    else:
        other = "or lower data.shuffle_shards"
    raise DataError(
        f"data.cache_gib must hold the shards that rows are shuffled over (data.shuffle={recipe.data.shuffle})",
        f"{has:g} GiB for {needed:.3g} GiB",
        f"Set data.cache_gib={_rounded_up(needed)}, {other}",
    )


def _group_bytes(manifest: Manifest, shuffle_shards: int) -> int:
    held_out = sum(shard.num_bytes for shard in manifest.shards_of("validation"))
    largest = sorted((shard.num_bytes for shard in manifest.shards_of("train")), reverse=True)
    return held_out + sum(largest[: 2 * shuffle_shards])


def _rounded_up(number: float) -> str:
    """Write a number with three digits, not less than it is."""
    digits = max(0, 2 - math.floor(math.log10(number)))
    return f"{math.ceil(number * 10**digits) / 10**digits:g}"


def _identity(recipe: Recipe, fingerprint: str) -> dict[str, Any]:
    """Return what decides the rows besides n, T and the seed; states from before a field existed lack it."""
    packing = recipe.data.packing
    order = None if recipe.data.shuffle == "rows" else f"shards in groups of {recipe.data.shuffle_shards}"
    return {
        "fingerprint": fingerprint,
        "mixture": None,
        "packing": None if packing == "cut" else packing,
        "order": order,
    }


def _refuse_twins(sources: list[_Source]) -> None:
    for one, other in itertools.pairwise(sources):
        if one.fingerprint == other.fingerprint:
            raise DataError(
                "the sources of data.mixture must be different shards",
                f"the same in {one.name} and {other.name}",
                "Name them once, with the sum of their weights",
            )


def _check_templates(sources: list[_Source]) -> None:
    """Refuse chats that are written in more than one way."""
    templates = {source.name: manifest.chat_template for source in sources for manifest in source.rows.manifests}
    named = {name: template for name, template in templates.items() if template}
    if len(set(named.values())) > 1:
        raise DataError(
            "the chats in data.mixture must all be rendered with one chat template",
            ", ".join(f"{template[:12]} in {name}" for name, template in named.items()),
            "Build them again with one tokenizer or --chat-template",
        )


def _check_epochs(recipe: Recipe, sources: list[_Source], order: MixedOrder) -> None:
    """Refuse a source that the run would read more often than it may."""
    taken = order.samples_taken(recipe.batch.samples_after(recipe.run.steps))
    for source, num_taken in zip(sources, taken, strict=True):
        num_rows = len(source.rows)
        most = recipe.data.max_epochs.get(source.name)
        if most is not None and num_taken > most * num_rows:
            raise DataError(
                f"a run must read {source.name} at most {most:g} times, as data.max_epochs says",
                f"{num_taken / num_rows:.2f} times: {num_taken:,} samples from {num_rows:,} rows",
                "Lower its weight in data.mixture or run.steps, or raise its limit",
            )


def _shape(recipe: Recipe) -> dict[str, int]:
    return {"seq_len": recipe.data.seq_len, "num_offsets": recipe.heads.num_offsets}


def _cache(recipe: Recipe) -> Path:
    return Path(recipe.run.cache)
