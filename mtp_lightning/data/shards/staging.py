"""A build on its way: the folder that it fills, and what a later build may take over when it was killed."""

import contextlib
import glob
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from mtp_lightning.console.progress import say
from mtp_lightning.data.shards.index import write_index
from mtp_lightning.data.shards.manifest import (
    MANIFEST_NAME,
    SPLITS,
    Manifest,
    Shard,
    Split,
    load_manifest,
    manifest_text,
)
from mtp_lightning.errors import DataError
from mtp_lightning.files.atomic_folder import STAGING_SUFFIX, check_new_folder, publish, staging_path
from mtp_lightning.files.durable import describe_file, sync
from mtp_lightning.files.lock import is_file_at, wait_for_lock

RECORD_SUFFIX = ".json"
JOURNAL_NAME = "journal.jsonl"
Counts = dict[Split, int]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    shard: Shard
    largest_token: NonNegativeInt


class _Counts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    train: NonNegativeInt
    validation: NonNegativeInt


@final
class StagingFolder:
    """The folder of an unfinished build; its shards are finished, or are built again.

    A finished shard has its record beside it, written after the shard was. The journal says how many documents of
    each split there were up to the end of each block, so that a later build need not tokenize what is in shards.
    """

    def __init__(self, path: Path) -> None:
        """Take over what a killed build left: shards up to the first that is not as its record says."""
        self.path = path
        self.largest_token = 0
        self.kept: dict[Split, list[Shard]] = {split: self._finished_shards(split) for split in SPLITS}
        self.kept_lengths = {split: self._lengths(split) for split in SPLITS}
        self.num_written = 0
        self._journaled = self._journal_entries()
        self._journal = (path / JOURNAL_NAME).open("w")
        self._journal.writelines(json.dumps(counts) + "\n" for counts in self._journaled)

    @property
    def num_kept(self) -> int:
        """Number of finished shards that were found."""
        return sum(map(len, self.kept.values()))

    def known(self, block: int) -> frozenset[Split]:
        """Return the splits whose documents up to the end of this block are all in finished shards."""
        if block >= len(self._journaled):
            return frozenset()
        counts = self._journaled[block]
        return frozenset(split for split in SPLITS if counts[split] <= self.kept_lengths[split].size)

    def note_shard(self, shard: Shard, largest_token: int) -> None:
        """Record a shard that is finished and on disk."""
        record = self._record(shard.name)
        unfinished = record.with_suffix(".unfinished")
        unfinished.write_text(_Record(shard=shard, largest_token=largest_token).model_dump_json())
        unfinished.rename(record)
        self.largest_token = max(self.largest_token, largest_token)
        self.num_written += 1

    def note_block(self, number: int, counts: Counts) -> None:
        """Record how many documents of each split there are up to the end of a block."""
        if number >= len(self._journaled):
            self._journal.write(json.dumps(counts) + "\n")
            self._journal.flush()

    def close(self) -> None:
        """Remove what only an unfinished build needs."""
        self._journal.close()
        (self.path / JOURNAL_NAME).unlink(missing_ok=True)
        for split in SPLITS:
            for record in (self.path / split).glob(f"*{RECORD_SUFFIX}"):
                record.unlink()

    def abandon(self, *, is_kept: bool) -> None:
        """Let go of the folder; unless its finished shards are to be kept for the next build, remove it."""
        with contextlib.suppress(OSError):  # on a full disk it is not all written
            self._journal.close()
        if not (is_kept and self.num_kept + self.num_written):
            shutil.rmtree(self.path, ignore_errors=True)

    def _record(self, name: str) -> Path:
        return self.path / f"{name}{RECORD_SUFFIX}"

    def _finished_shards(self, split: Split) -> list[Shard]:
        shards: list[Shard] = []
        while shard := self._finished_shard(f"{split}/{len(shards):05d}.tar"):
            shards.append(shard)
        keep = {shard.name for shard in shards} | {f"{shard.name}{RECORD_SUFFIX}" for shard in shards}
        for path in (self.path / split).glob("*"):
            if f"{split}/{path.name}" not in keep:
                path.unlink()
        return shards

    def _finished_shard(self, name: str) -> Shard | None:
        try:
            record = _Record.model_validate_json(self._record(name).read_bytes())
            found = describe_file(self.path / name, is_synced=True)
        except (OSError, ValidationError):
            return None
        shard = record.shard
        if (name, found.sha256, found.size_bytes) != (shard.name, shard.sha256, shard.num_bytes):
            return None
        if max(member.end(token_bytes=2) for member in shard.members) > found.size_bytes:
            return None
        self.largest_token = max(self.largest_token, record.largest_token)
        return shard

    def _lengths(self, split: Split) -> NDArray[np.int64]:
        """Return the lengths of all documents in the finished shards of a split."""
        lengths = [np.array([], dtype=np.int64)]
        for shard in self.kept[split]:
            content = np.memmap(self.path / shard.name, dtype=np.uint8, mode="r")
            lengths += [
                content[member.lengths_at : member.lengths_at + 4 * member.num_documents].view("<u4").astype(np.int64)
                for member in shard.members
            ]
        return np.concatenate(lengths)

    def _journal_entries(self) -> list[Counts]:
        """Return the entries before the first that is not as it was written."""
        path = self.path / JOURNAL_NAME
        entries: list[Counts] = []
        with contextlib.suppress(ValidationError):
            for line in path.read_bytes().splitlines() if path.exists() else []:
                counts = _Counts.model_validate_json(line)
                entries.append({split: getattr(counts, split) for split in SPLITS})
        return entries


@contextlib.contextmanager
def exclusive_build(out: Path, identity: str, say_it: Callable[[str], None]) -> Iterator[Path | None]:
    """Yield the folder to build into, for this process alone; None when another has built the very same meanwhile.

    The folder is named after the build's identity, so that a build is taken up only by an equal one. A process that
    finds it in use waits: the lock ends with its holder, however that ends.
    """
    path = staging_path(out, identity[:12])
    while True:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            wait_for_lock(
                descriptor,
                on_waiting=lambda holder: say_it(f"waiting for {holder}, which builds the same into {path}"),
            )
            if is_file_at(descriptor, path):
                yield path
                return
            if is_file_at(descriptor, out):
                yield None
                return
        finally:
            os.close(descriptor)


def say_others(out: Path, own: Path, tell: Callable[[str], None] = say) -> None:
    """Name what other builds left; theirs is not removed, since one may be at work."""
    for path in sorted(out.parent.glob(f"{glob.escape(out.name)}{STAGING_SUFFIX}-*")):
        if path.absolute() != own.absolute():
            left = "was left by a build that was killed, unless another process is at work on it"
            tell(f"{path} {left}; it may be removed")


def is_built(out: Path, source_listing: str) -> bool:
    """Tell whether a folder holds shards of this very listing; refuse one that holds anything else.

    Raises:
        DataError: It does.
    """
    if (out / MANIFEST_NAME).exists() and load_manifest(out).source_listing == source_listing:
        return True
    check_new_folder(out, DataError)
    return False


def commit(staging: StagingFolder, out: Path, manifest: Manifest) -> None:
    """Write what makes the folder complete and give it its name, unless an equal one has it already."""
    write_index(staging.path, manifest)
    (staging.path / MANIFEST_NAME).write_text(manifest_text(manifest))
    staging.close()
    for path in staging.path.iterdir():
        sync(path)
    try:
        publish(staging.path, out)
    except OSError:
        if not (out / MANIFEST_NAME).exists():
            raise
        if (there := load_manifest(out).fingerprint) != manifest.fingerprint:
            found = f"shards of fingerprint {there}, not {manifest.fingerprint}: {out}"
            hint = "Name another folder, or move that away"
            raise DataError("the folder to write must be new or empty", found, hint) from None
        shutil.rmtree(staging.path)
        sync(out.parent)
