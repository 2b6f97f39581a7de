"""Writing shards: POSIX tar files that stock webdataset reads, and whose payloads can be addressed by offset."""

import contextlib
import io
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

import numpy as np

from mtp_lightning.data.shards.manifest import Member, Shard, Split
from mtp_lightning.data.shards.tokenize import Mask
from mtp_lightning.data.tokenizers.base import TokenArray
from mtp_lightning.errors import DataError
from mtp_lightning.files.durable import describe_file

MEMBER_TOKENS = 1 << 20
SHARD_BYTES = 256 << 20
MOST_DOCUMENT_TOKENS = 2**32 - 1  # what a length in `.len` can say


@final
class SplitWriter:
    """Write the documents of one split, in the order in which they come, as `SPLIT/00000.tar` and so on.

    A member is closed at the first document boundary past `member_tokens`, a shard at the first member past
    `shard_bytes`. Equal documents give equal bytes: the headers carry no time and no owner.
    """

    def __init__(
        self,
        root: Path,
        split: Split,
        *,
        member_tokens: int,
        shard_bytes: int,
        kept: Sequence[Shard] = (),
        on_shard: Callable[[Shard, int], None] = lambda shard, largest_token: None,
    ) -> None:
        """Begin after the shards that are `kept`; `on_shard` is told of each further one, and its largest id."""
        self._root = root
        self._split: Split = split
        self._member_tokens = member_tokens
        self._shard_bytes = shard_bytes
        self._on_shard = on_shard
        self._documents: list[TokenArray] = []
        self._masks: list[Mask | None] = []
        self._num_tokens = 0
        self._num_members = sum(len(shard.members) for shard in kept)
        self._members: list[Member] = []  # of the open shard
        self._shards: list[Shard] = list(kept)
        self._largest_token = 0  # of the open shard
        self._tar: tarfile.TarFile | None = None

    def add(self, tokens: TokenArray, mask: Mask | None = None) -> None:
        """Append one document, its end-of-document id included; a mask has 0 for tokens that are no targets."""
        if tokens.size > MOST_DOCUMENT_TOKENS:
            raise DataError(
                f"a document must have at most {MOST_DOCUMENT_TOKENS:,} tokens",
                f"{tokens.size:,}",
                "Split the file, or give it as JSONL with a document per line",
            )
        self._documents.append(tokens)
        self._masks.append(mask)
        self._num_tokens += tokens.size
        if self._num_tokens >= self._member_tokens:
            self._write_member()

    def close(self) -> list[Shard]:
        """Write what is left and return the shards."""
        if self._documents:
            self._write_member()
        self._close_shard()
        return self._shards

    def abandon(self) -> None:
        """Let go of an unfinished shard, whatever state its disk is in; of no effect after `close`."""
        if self._tar is not None and self._tar.fileobj is not None:
            with contextlib.suppress(OSError):
                self._tar.fileobj.close()
        self._tar = None

    def _write_member(self) -> None:
        ids = np.concatenate(self._documents)
        self._largest_token = max(self._largest_token, int(ids.max()))
        tokens = ids.tobytes()
        lengths = np.array([document.size for document in self._documents], dtype="<u4").tobytes()
        if self._tar is None:
            self._tar = self._open_shard()
        key = f"{self._num_members:09d}"
        member = Member(
            key=key,
            tokens_at=_append(self._tar, f"{key}.tok", tokens),
            num_tokens=self._num_tokens,
            tokens_crc32=zlib.crc32(tokens),
            lengths_at=_append(self._tar, f"{key}.len", lengths),
            num_documents=len(self._documents),
            lengths_crc32=zlib.crc32(lengths),
            **self._append_mask(self._tar, key),
        )
        self._members.append(member)
        self._num_members += 1
        self._documents, self._masks, self._num_tokens = [], [], 0
        if self._tar.offset >= self._shard_bytes:
            self._close_shard()

    def _append_mask(self, tar: tarfile.TarFile, key: str) -> dict[str, int]:
        """Append the loss mask of the open member, if it needs one."""
        if all(mask is None or mask.all() for mask in self._masks):
            return {}
        masks = [
            np.ones(document.size, dtype=np.uint8) if mask is None else mask
            for document, mask in zip(self._documents, self._masks, strict=True)
        ]
        payload = np.concatenate(masks).tobytes()
        return {"mask_at": _append(tar, f"{key}.msk", payload), "mask_crc32": zlib.crc32(payload)}

    def _open_shard(self) -> tarfile.TarFile:
        path = self._root / self._next_name()
        path.parent.mkdir(exist_ok=True)
        return tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)

    def _close_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        path = self._root / self._next_name()
        record = describe_file(path, is_synced=False)
        shard = Shard(
            name=self._next_name(),
            split=self._split,
            num_bytes=record.size_bytes,
            sha256=record.sha256,
            members=self._members,
        )
        self._shards.append(shard)
        self._on_shard(shard, self._largest_token)
        self._members, self._largest_token = [], 0

    def _next_name(self) -> str:
        return f"{self._split}/{len(self._shards):05d}.tar"


def _append(tar: tarfile.TarFile, name: str, payload: bytes) -> int:
    """Append a file to the tar and return the offset of its payload."""
    header = tarfile.TarInfo(name)  # time 0, owner 0 and mode 0644 unless told otherwise
    header.size = len(payload)
    payload_at = tar.offset + tarfile.BLOCKSIZE  # a ustar header with a short name is one block
    tar.addfile(header, io.BytesIO(payload))
    return payload_at
