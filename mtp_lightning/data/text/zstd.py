"""Reading zstd files, with an error where one breaks off: the library's own reader then just ends."""

import io
from typing import Any, BinaryIO, final

from mtp_lightning.data.text.extras import import_extra

READ_BYTES = 1 << 20


@final
class ZstdStream(io.RawIOBase):
    """What the frames of a zstd file hold, one after another."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        """Take the compressed file.

        Raises:
            DataError: The library `zstandard` is not installed.
        """
        super().__init__()
        self._library = import_extra("zstandard", f"read {name}")
        self._file = file
        self._frame: Any = None
        self._compressed = b""
        self._plain = b""

    def readable(self) -> bool:
        """Say that this can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read as much as there is at hand.

        Raises:
            EOFError: The file ends inside a frame.
            zstandard.ZstdError: The file is damaged.
        """
        while not self._plain and self._advance():
            pass
        taken = self._plain[: len(buffer)]
        buffer[: len(taken)] = taken
        self._plain = self._plain[len(taken) :]
        return len(taken)

    def _advance(self) -> bool:
        """Decompress one piece more; return whether there was any."""
        self._compressed = self._compressed or self._file.read(READ_BYTES)
        if not self._compressed:
            if self._frame is not None:
                raise EOFError("the file ends inside a frame")
            return False
        self._frame = self._frame or self._library.ZstdDecompressor().decompressobj()
        self._plain = self._frame.decompress(self._compressed)
        self._compressed = b""
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None
        return True


def open_zstd(file: BinaryIO, name: str) -> BinaryIO:
    """Return a buffered stream of what a zstd file holds."""
    return io.BufferedReader(ZstdStream(file, name), READ_BYTES)
