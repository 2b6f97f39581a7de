"""Files opened as streams of bytes: decompressed to their very end, and in UTF-8."""

import bz2
import codecs
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, final

from mtp_lightning.data.text.extras import import_extra
from mtp_lightning.data.text.kinds import COMPRESSIONS, encoding_of, kind_of

READ_BYTES = 1 << 20
MOST_ZSTD_WINDOW = 31  # log2 of bytes: what `zstd --long=31` writes
DAMAGE = (EOFError, OSError)
"""What reading a compressed stream raises where it is damaged or cut."""


@contextmanager
def opened_text(raw: Any, name: str, encoding: str | None) -> Iterator[io.BufferedReader]:
    """Yield a file decompressed and as UTF-8, without byte-order mark; a mark comes before the encoding given.

    Raises:
        DataError: the library that decompresses it is not installed.
    """
    stream = decompressed(io.BufferedReader(raw, READ_BYTES), name)
    marked, num_bytes = encoding_of(stream.peek(4))
    stream.read(num_bytes)
    actual = codecs.lookup(marked or encoding or "utf-8").name
    yield stream if actual == "utf-8" else io.BufferedReader(_Recoded(stream, actual), READ_BYTES)


def decompressed(stream: "io.BufferedReader[Any]", name: str) -> "io.BufferedReader[Any]":
    """Return a stream of what is compressed in another, or that one if nothing is.

    Several gzip members, bzip2 or xz streams, or zstd frames are read one after another; what follows the last one
    is an error, as is an end within one.

    Raises:
        DataError: the library that decompresses it is not installed.
    """
    kind = kind_of(stream.peek(512)[:512])
    if kind not in COMPRESSIONS:
        return stream
    makers: dict[str, Callable[[], Any]] = {"gzip": _Gzip, "bzip2": bz2.BZ2Decompressor, "xz": lzma.LZMADecompressor}
    if kind == "zstd":
        library = import_extra("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd", f"read {name}")
        options = {library.DecompressionParameter.window_log_max: MOST_ZSTD_WINDOW}
        makers["zstd"] = lambda: library.ZstdDecompressor(options=options)
    return io.BufferedReader(_Frames(stream, makers[kind]), READ_BYTES)


def bounded(stream: BinaryIO, most_bytes: int) -> bytes | None:
    """Return all that a stream holds, or None if that is more than so many bytes; takes memory only for what comes."""
    pieces: list[bytes] = []
    while piece := stream.read(READ_BYTES):
        pieces.append(piece)
        most_bytes -= len(piece)
        if most_bytes < 0:
            return None
    return b"".join(pieces)


@final
class _Gzip:
    """zlib's decompressor as those of the other compressions are."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(zlib.MAX_WBITS + 16)

    def decompress(self, content: bytes, most_bytes: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + content, most_bytes)

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


@final
class _Frames(io.RawIOBase):
    """The content of compressed frames. Unlike the library's readers it takes damage after a frame for damage."""

    def __init__(self, stream: BinaryIO, maker: Callable[[], Any]) -> None:
        super().__init__()
        self._stream, self._maker = stream, maker
        self._frame: Any = None
        self._piece = b""
        self._error: Exception | None = None  # which comes after what could be read

    def readable(self) -> bool:
        """Say that this can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Decompress as many bytes as fit.

        Raises:
            EOFError: The stream ends within a frame.
            OSError: It is damaged.
        """
        size = 0
        try:
            while size < len(buffer) and not self._error and (self._frame is not None or self._begin()):
                content = self._next(len(buffer) - size)
                buffer[size : size + len(content)] = content
                size += len(content)
        except EOFError as error:
            self._error = error
        except Exception as error:  # each library has its own
            self._error = OSError(f"{type(error).__name__}: {error}")
        if self._error and not size:
            raise self._error
        return size

    def _next(self, most_bytes: int) -> bytes:
        is_end = False
        if not self._piece and self._frame.needs_input:
            self._piece = self._stream.read(READ_BYTES)
            is_end = not self._piece
        content: bytes = self._frame.decompress(self._piece, most_bytes)
        is_whole = self._frame.eof
        if is_end and not content and not is_whole:
            raise EOFError("the compressed content is cut before its end")
        self._piece = self._frame.unused_data if is_whole else b""
        self._frame = None if is_whole else self._frame
        return content

    def _begin(self) -> bool:
        """Begin with the next frame, if there is one; zeros may stand between two of xz."""
        while not (piece := self._piece.lstrip(b"\0")):
            self._piece = self._stream.read(READ_BYTES)
            if not self._piece:
                return False
        self._piece, self._frame = piece, self._maker()
        return True


@final
class _Recoded(io.RawIOBase):
    """A text of another encoding as UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        super().__init__()
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._content = b""

    def readable(self) -> bool:
        """Say that this can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Decode as many bytes as fit.

        Raises:
            UnicodeDecodeError: It cannot be decoded.
        """
        pieces, is_end = [self._content], False
        while sum(map(len, pieces)) < len(buffer) and not is_end:
            piece = self._stream.read(READ_BYTES)
            is_end = not piece
            pieces.append(self._decoder.decode(piece, is_end).encode("utf-8", "surrogatepass"))
        content = b"".join(pieces)
        size = min(len(content), len(buffer))
        buffer[:size], self._content = content[:size], content[size:]
        return size
