"""How often every id may be a target in the training split of shards: counted once, kept in the run's cache."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mtp_lightning.console.progress import counted, say
from mtp_lightning.data.shards.arrays import arrays_of
from mtp_lightning.data.shards.cache import ShardCache
from mtp_lightning.data.shards.manifest import Manifest
from mtp_lightning.data.shards.mapped import MappedShard, ShardMaps
from mtp_lightning.errors import refusal_of
from mtp_lightning.files.durable import finished_file

MOST_TOKENS = 2**28  # that are counted: more would not change which ids are the frequent ones
BLOCK_TOKENS = 2**20
Counts = NDArray[np.int64]


def token_counts(folder: Path, cache: Path, shard_cache: ShardCache | None = None) -> Counts:
    """Count the ids 0 to the largest in the training split; prompts, which are never targets, are left out.

    Of more than `MOST_TOKENS` tokens only shards that hold about as many are read, spread evenly; shards are read
    whole, so the counts depend on nothing but them.

    Raises:
        DataError: The folder is damaged, or a shard cannot be fetched.
    """
    maps = ShardMaps(folder, "train", shard_cache)
    path = cache / f"token-counts-{maps.manifest.fingerprint[:16]}.npz"
    kept = _read(path, maps.manifest)
    if kept is not None:
        return kept
    counts = np.zeros(maps.manifest.largest_token + 1, dtype=np.int64)
    places = _spread([shard.num_tokens for shard in maps.shards])
    total = sum(maps.shards[place].num_tokens for place in places)
    with counted("Counting tokens", total=total, unit="tokens") as advance:
        for place in places:
            for start in range(0, maps.shards[place].num_tokens, BLOCK_TOKENS):
                width = min(BLOCK_TOKENS, maps.shards[place].num_tokens - start)
                counts += np.bincount(_targets(maps[place], start, width), minlength=counts.size)[: counts.size]
                advance(width)
            maps.keep_only([])
    _write(path, counts)
    return counts


def _targets(shard: MappedShard, start: int, width: int) -> NDArray[np.int64]:
    starts = np.array([start])
    tokens: NDArray[np.int64] = shard.tokens(starts, width)[shard.loss_mask(starts, width)].astype(np.int64)
    return tokens


def _spread(sizes: list[int]) -> list[int]:
    """Choose places of shards, spread evenly, that hold about `MOST_TOKENS` tokens; all of them where there are fewer.

    >>> _spread([2**27] * 6)
    [0, 3]
    """
    share = min(1.0, MOST_TOKENS / max(1, sum(sizes)))
    number = max(1, round(share * len(sizes)))
    return [place * len(sizes) // number for place in range(min(number, len(sizes)))]


def _read(path: Path, manifest: Manifest) -> Counts | None:
    """Return the counts that are kept; None where there are none, or damaged ones."""
    try:
        counts = arrays_of(path, ["counts"])["counts"]
    except (OSError, ValueError):
        return None
    is_whole = counts.dtype == np.int64 and counts.size == manifest.largest_token + 1 and counts.min() >= 0
    return counts.astype(np.int64) if is_whole else None


def _write(path: Path, counts: Counts) -> None:
    try:
        with finished_file(path) as file:
            np.savez(file, allow_pickle=False, counts=counts)
    except OSError as error:
        say(f"the counts of tokens could not be kept: {refusal_of(error, path)}", stderr=True)
