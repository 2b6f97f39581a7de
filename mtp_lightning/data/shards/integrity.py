"""Members of a shard against their manifest, when they are read for the first time."""

import zlib
from collections.abc import Iterable
from typing import final

import numpy as np
from numpy.typing import NDArray

from mtp_lightning.data.shards.manifest import Shard
from mtp_lightning.errors import DataError

Bytes = NDArray[np.uint8]


@final
class MemberChecks:
    """Compares what is read of a shard with the manifest: each member once, in full, before a row of it is used.

    So a byte that flipped on a disk, or a shard that was exchanged for another of the same size, is never trained on.
    Costs one pass over a member per process, about 1 ms per 2 MB.
    """

    def __init__(
        self, shard: Shard, file: Bytes, origin: str, *, token_bytes: int, lengths: Bytes | None = None
    ) -> None:
        """Take the bytes of the shard, and of the file with the lengths of its documents if it is another."""
        self._shard, self._file, self._origin = shard, file, origin
        self._lengths = file if lengths is None else lengths
        self._token_bytes = token_bytes
        self._unread = set(range(len(shard.members)))

    def lengths(self) -> list[NDArray[np.uint32]]:
        """Return the lengths of the documents of each member, checked.

        Raises:
            DataError: They are not as written, one is 0, or they do not add up to a member's tokens.
        """
        found = []
        for member in self._shard.members:
            place = f"{self._origin}, member {member.key}.len, byte {member.lengths_at:,}"
            content = self._lengths[member.lengths_at : member.lengths_at + 4 * member.num_documents]
            check_written(content, member.lengths_crc32, place)
            lengths = content.view("<u4")
            check_document_lengths(lengths, member.num_tokens, place)
            found.append(lengths)
        return found

    def check_tokens(self, first: NDArray[np.int64], last: NDArray[np.int64]) -> None:
        """Check the token ids and masks of members that are read for the first time, each from a first to a last.

        Raises:
            DataError: They are not as written.
        """
        if self._unread:
            for begin, end in zip(first.tolist(), last.tolist(), strict=True):
                self._check(self._unread.intersection(range(begin, end + 1)))

    def _check(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            member = self._shard.members[number]
            content = self._file[member.tokens_at : member.tokens_at + self._token_bytes * member.num_tokens]
            place = f"{self._origin}, member {member.key}.tok, byte {member.tokens_at:,}"
            check_written(content, member.tokens_crc32, place)
            if member.mask_at is not None:
                mask = self._file[member.mask_at : member.mask_at + member.num_tokens]
                place = f"{self._origin}, member {member.key}.msk, byte {member.mask_at:,}"
                check_written(mask, member.mask_crc32, place)
            self._unread.discard(number)


def check_written(content: Bytes, crc32: int | None, place: str) -> None:
    """Check the bytes at a place of a shard.

    Raises:
        DataError: They are not those whose checksum the manifest has.
    """
    if zlib.crc32(content.data) != crc32:
        raise wrong_shard(f"the {content.size:,} bytes from {place} on must be as written", "changed bytes")


def check_document_lengths(lengths: NDArray[np.uint32], num_tokens: int, place: str) -> None:
    """Check the document lengths of one member.

    Raises:
        DataError: One is 0, or they do not add up.
    """
    if not lengths.all():
        at = int(np.argmin(lengths))
        raise wrong_shard(f"a document must have a token or more: lengths at {place}", f"0 for document {at:,} there")
    total = int(lengths.sum(dtype=np.int64))
    if total != num_tokens:
        raise wrong_shard(f"lengths at {place} must add up to the {num_tokens:,} tokens", f"{total:,}")


def wrong_shard(expected: str, found: str) -> DataError:
    """Return the error of a shard that is not what its manifest says."""
    hint = "Copy the folder again from its source, or build the shards (adopt the folder) again"
    return DataError(expected, found, hint)
