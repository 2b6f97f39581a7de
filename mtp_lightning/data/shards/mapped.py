"""Shards in memory: mapped when first needed, a bounded number at a time."""

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
from numpy.typing import NDArray

from mtp_lightning.data.shards.cache import ShardCache
from mtp_lightning.data.shards.index import Index, load_index
from mtp_lightning.data.shards.integrity import MemberChecks
from mtp_lightning.data.shards.manifest import (
    LINK_NAME,
    AdoptedIndex,
    AdoptedManifest,
    AdoptedShard,
    Manifest,
    Shard,
    Split,
    load_manifest,
)
from mtp_lightning.errors import DataError
from mtp_lightning.files.durable import describe_file
from mtp_lightning.files.untrusted import reason_of

MOST_MAPPED_SHARDS = 256  # each keeps a file descriptor and the ends of its documents
Integers = NDArray[np.int64]


@final
class ShardMaps:
    """The shards of one split, by their place in it; copies sent to other processes map anew."""

    def __init__(self, folder: Path, split: Split, cache: ShardCache | None = None) -> None:
        """Open a shard folder and check that every shard file has its size, unless shards come from a cache.

        Raises:
            DataError: The folder is damaged.
        """
        self.folder = folder
        self.cache = cache
        self.manifest = load_manifest(folder)
        if cache is None:
            check_sizes(folder, self.manifest)
        elif isinstance(self.manifest, AdoptedManifest):
            raise DataError(
                f"shards behind a URL, {cache.url}, must be of `mtp data build`",
                "an adopted folder, whose tokens lie elsewhere",
                "Adopt the tokens where they can be read as files, with `mtp data adopt`",
            )
        self.shards = self.manifest.shards_of(split)
        self.index = load_index(folder, self.manifest)
        self._numbers = [i for i, shard in enumerate(self.manifest.shards) if shard.split == split]
        self._mapped: dict[int, MappedShard] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}

    def __getitem__(self, place: int) -> "MappedShard":
        if place not in self._mapped:
            if len(self._mapped) >= MOST_MAPPED_SHARDS:
                del self._mapped[next(iter(self._mapped))]
            number = self._numbers[place]
            members = Members(self.manifest, self.index, number, self._origin(place), self._lengths_of(place))
            self._mapped[place] = MappedShard(self._opened(place), members)
        return self._mapped[place]

    def _lengths_of(self, place: int) -> NDArray[np.uint8] | None:
        """Return the bytes of the file that has the lengths of a shard's documents, if it is another file."""
        shard = self.shards[place]
        return None if shard.lengths_name == shard.name else bytes_of(self.folder / shard.lengths_name)

    def keep_only(self, places: Sequence[int]) -> None:
        """Unmap all shards but some, so that a cache may remove them."""
        for place in self._mapped.keys() - set(places):
            del self._mapped[place]

    def _opened(self, place: int) -> BinaryIO:
        shard = self.shards[place]
        if self.cache is not None:
            return self.cache.open(shard, free_own=self._mapped.clear)
        check_size(self.folder, shard)  # again: it may have been replaced since
        return _opened_file(self.folder / shard.name)

    def describe(self, place: int, start: int) -> str:
        """Return the place of a token of a shard in words: file, member, token in it, byte of the file."""
        shard = self[place]
        return f"{shard.describe(start, self._origin(place))}, byte {shard.byte_of(start):,}"

    def _origin(self, place: int) -> str:
        return f"{self.cache.url if self.cache else self.folder}/{self.shards[place].name}"


@dataclass(frozen=True)
class Members:
    """Which shard of a manifest a file is."""

    manifest: Manifest
    index: Index
    number: int  # of the shard in the manifest
    origin: str  # path or URL
    lengths: NDArray[np.uint8] | None  # bytes of the file that has the lengths of its documents, if it is another


@final
class MappedShard:
    """One file in memory, seen as one array of token ids with the members' places in it."""

    def __init__(self, file: BinaryIO, members: Members) -> None:
        """Map an open file and close it; the map keeps what is locked of it locked."""
        index, inside = members.index, members.index.shard == members.number
        shard = members.manifest.shards[members.number]
        stored, self._dtype = shard.stored_as(members.manifest.dtype), np.dtype(members.manifest.dtype)
        self._first_tokens = np.concatenate([[0], np.cumsum(index.num_tokens[inside])])
        # All members lie whole tokens apart, so that from the first one's phase on the file may be seen as tokens.
        self._phase_bytes = int(index.tokens_at[inside][0]) % stored.itemsize
        self._shifts = index.tokens_at[inside] // stored.itemsize - self._first_tokens[:-1]
        self._mask_at = index.mask_at[inside]
        with file:
            self._bytes = np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))
        num_bytes = self._bytes.size - self._phase_bytes
        self._words = self._bytes[self._phase_bytes :][: num_bytes - num_bytes % stored.itemsize].view(stored)
        self._checks = MemberChecks(
            shard, self._bytes, members.origin, token_bytes=stored.itemsize, lengths=members.lengths
        )

    def tokens(self, starts: Integers, width: int) -> NDArray[Any]:
        """Return the windows of a width that begin at those tokens of the shard, in the type of the manifest.

        Raises:
            DataError: A member that is read for the first time is not as written.
        """
        member = self._first_tokens.searchsorted(starts, side="right") - 1
        last = self._first_tokens.searchsorted(starts + width) - 1
        self._checks.check_tokens(member, last)
        fits = member == last
        at = starts + self._shifts[member]
        windows = np.empty((starts.size, width), dtype=self._dtype)  # (B, width)
        for line, (begin, is_whole) in enumerate(zip(at.tolist(), fits.tolist(), strict=True)):
            # Slice by slice: a gather is several times slower.
            windows[line] = self._words[begin : begin + width] if is_whole else self._across(starts[line], width)
        return windows

    def documents(self, starts: Integers, width: int) -> NDArray[np.int32]:
        """Return for each token of those windows the number of its document within the window."""
        ends = self.document_ends
        first = np.searchsorted(ends, starts, side="right")
        last = np.searchsorted(ends, starts + width - 1, side="right")
        counts = last - first + 1  # documents in each window
        line = np.repeat(np.arange(starts.size), counts)
        number = np.arange(line.size) - np.repeat(np.cumsum(counts) - counts, counts)
        end = ends[np.minimum(first[line] + number, ends.size - 1)]
        stop = np.where(number == counts[line] - 1, width, end - starts[line])  # in the window
        length = np.where(number == 0, stop, stop - np.concatenate([[0], stop[:-1]]))
        return np.repeat(number.astype(np.int32), length).reshape(starts.size, width)

    def loss_mask(self, starts: Integers, width: int) -> NDArray[np.bool_]:
        """Return for each token of those windows whether it may be a target."""
        positions = starts[:, None] + np.arange(width)  # (B, width)
        member = np.searchsorted(self._first_tokens, positions, side="right") - 1
        has_mask = self._mask_at[member] >= 0
        at = np.where(has_mask, self._mask_at[member] + positions - self._first_tokens[member], 0)
        return np.where(has_mask, self._bytes[at] == 1, True)

    def document_places(self) -> tuple[Integers, Integers]:
        """Return for each document of the shard its first token and its length."""
        ends = self.document_ends
        begins = np.concatenate([[0], ends[:-1]])
        return begins, ends - begins

    def describe(self, start: int, name: str) -> str:
        """Return the place of a token in words: shard, member, token in it."""
        member = int(np.searchsorted(self._first_tokens, start, side="right")) - 1
        return f"{name}, member {member}, token {start - int(self._first_tokens[member]):,}"

    def byte_of(self, start: int) -> int:
        """Return where a token lies in the file."""
        member = int(np.searchsorted(self._first_tokens, start, side="right")) - 1
        return self._phase_bytes + int(start + self._shifts[member]) * self._words.itemsize

    @cached_property
    def document_ends(self) -> Integers:
        """Return for each document of the shard the token after its last one."""
        return np.cumsum(np.concatenate(self._checks.lengths()), dtype=np.int64)

    def _across(self, start: np.int64, width: int) -> NDArray[Any]:
        positions = start + np.arange(width)
        member = np.searchsorted(self._first_tokens, positions, side="right") - 1
        words: NDArray[Any] = self._words[positions + self._shifts[member]]
        return words


def bytes_of(path: Path) -> NDArray[np.uint8]:
    """Return the bytes of a file, mapped.

    Raises:
        DataError: It cannot be opened.
    """
    with _opened_file(path) as file:
        return np.asarray(np.memmap(file, dtype=np.uint8, mode="r"))


def _opened_file(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"shard {path} must be readable", error.strerror or str(error), "See to its rights") from error


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Check that the shard files of a manifest are there, as long as they were written, and no others.

    Of an adoption, whose folder may hold others, the files by which documents were found must be unchanged.

    Raises:
        DataError: One is not; a shard that was cut short is found here, before anything is read.
    """
    for shard in manifest.shards:
        check_size(folder, shard)
    if isinstance(manifest, AdoptedManifest):
        for index in manifest.indexes:
            check_index(folder, index)
        return
    known = {shard.name for shard in manifest.shards}
    strange = sorted({path.relative_to(folder).as_posix() for path in folder.glob("*/*.tar")} - known)
    if strange:
        raise DataError(
            f"{folder} must hold only the shards of its manifest",
            ", ".join(strange[:3]),
            "Move it away, or build the shards again with `mtp data build`",
        )


def check_size(folder: Path, shard: Shard) -> None:
    """Check that a shard file is there, and as long as it was written.

    Raises:
        DataError: It is not.
    """
    path = folder / shard.name
    expected = f"shard {path} must have {shard.num_bytes:,} bytes, as its manifest says"
    hint = "Copy the file again from its source, or build the shards again with `mtp data build`"
    if isinstance(shard, AdoptedShard):
        hint = _adopted_hint(folder)
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(expected, "no such file", hint) from None
    except OSError as error:
        raise DataError(expected, reason_of(error), "See to its rights and those of the folders above it") from error
    if not stat.S_ISREG(found.st_mode):
        raise DataError(expected, "a folder, a FIFO or a device in place of a file", hint)
    if found.st_size != shard.num_bytes:
        raise DataError(expected, f"{found.st_size:,} bytes", hint)


def check_index(folder: Path, index: AdoptedIndex) -> None:
    """Check that a file by which documents were found is as it was when they were.

    Raises:
        DataError: It is not.
    """
    path = folder / index.name
    expected = f"{path} must be as it was when its folder was adopted: {index.num_bytes:,} bytes, sha256 {index.sha256}"
    if not path.is_file():
        raise DataError(expected, "no such file", _adopted_hint(folder))
    try:
        found = describe_file(path, is_synced=True)
    except OSError as error:
        raise DataError(expected, reason_of(error), _adopted_hint(folder)) from error
    if (found.size_bytes, found.sha256) != (index.num_bytes, index.sha256):
        raise DataError(expected, f"{found.size_bytes:,} bytes, sha256 {found.sha256}", _adopted_hint(folder))


def _adopted_hint(folder: Path) -> str:
    return (
        f"Copy the file again from its source, point the link {folder / LINK_NAME} to where the adopted folder lies "
        "now, or adopt it again with `mtp data adopt`"
    )
