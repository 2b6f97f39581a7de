"""The texts that a model has written so far, on disk: what is in there need not be written again."""

import os
import struct
import zlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self, final

import numpy as np

from mtp_lightning.data.shards.build import sync

Texts = list[list[int]]
_HEAD = struct.Struct("<III")  # texts, their tokens together, checksum of both numbers and of what follows


class _Record(NamedTuple):
    """The texts of a batch: after the head their lengths, then their tokens, four bytes each."""

    texts: Texts
    num_bytes: int


@final
class TextLog:
    """Batches of texts in the order in which they were written; one that `note` has returned from survives a kill.

    First give back with `recall` what is there, then add with `note`. One process at a time; one batch is in memory.
    """

    def __init__(self, path: Path) -> None:
        """Open or begin the file; a batch that was being written when its process ended is cut off."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._file: BinaryIO = os.fdopen(descriptor, "r+b", buffering=0)
        self.num_texts = 0
        self._end = 0
        while record := self._read():
            self._end += record.num_bytes
            self.num_texts += len(record.texts)
        self._file.truncate(self._end)
        os.fsync(descriptor)
        sync(path.parent)
        self._file.seek(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def recall(self) -> Texts | None:
        """Return the next batch, or None when all that was written has been given back."""
        record = self._read()
        return None if record is None else record.texts

    def note(self, texts: Texts) -> None:
        """Add a batch, on disk when this returns; of use only after the last `recall`."""
        lengths = np.array([len(text) for text in texts], dtype="<u4")
        tokens = np.array([token for text in texts for token in text], dtype="<u4")
        content = lengths.tobytes() + tokens.tobytes()
        sizes = (lengths.size, tokens.size)
        left = memoryview(_HEAD.pack(*sizes, _checksum(*sizes, content)) + content)
        while left:
            left = left[self._file.write(left) :]
        os.fsync(self._file.fileno())
        self.num_texts += len(texts)

    def _read(self) -> _Record | None:
        """Read the next batch; None at the end, and where what follows is not whole."""
        room_bytes = os.fstat(self._file.fileno()).st_size - self._file.tell()
        if room_bytes < _HEAD.size:
            return None
        num_texts, num_tokens, checksum = _HEAD.unpack(self._file.read(_HEAD.size))
        num_bytes = 4 * (num_texts + num_tokens)
        if num_bytes > room_bytes - _HEAD.size:
            return None
        content = self._file.read(num_bytes)
        if _checksum(num_texts, num_tokens, content) != checksum:
            return None
        numbers = np.frombuffer(content, dtype="<u4")
        ends = numbers[:num_texts].cumsum()[:-1]
        texts = [text.tolist() for text in np.split(numbers[num_texts:], ends)]
        return _Record(texts, _HEAD.size + num_bytes)


def _checksum(num_texts: int, num_tokens: int, content: bytes) -> int:
    return zlib.crc32(content, zlib.crc32(struct.pack("<II", num_texts, num_tokens)))
