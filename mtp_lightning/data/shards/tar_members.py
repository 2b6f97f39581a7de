"""Tars read from front to back, with an error where one is damaged: tarfile takes damage after a member for the end.

What can be told is: a header whose checksum is wrong or that is cut, content or padding that is cut, compressed bytes
that do not add up, bytes after the end, and no end. A tar has no checksum of its members' content.

POSIX ends a tar with blocks of zeros. A few writers leave them out, and most readers do not ask for them; but a tar
that was cut between two members lacks nothing else, so without them nobody can tell whether members are lost. To add
them to a tar that is known to be whole takes one command; to have trained on half of the data takes weeks. So a tar
without an end is refused. One block of the two is enough: nothing is lost before it.
"""

import io
import tarfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Self, final

from mtp_lightning.data.text import compressed
from mtp_lightning.files.untrusted import shown

PIECE_BYTES = 1 << 20
MOST_MEMBER_BYTES = 1 << 30  # of one document, which is held in memory
MOST_NAME_BYTES = 1 << 20  # of a long name or the attributes of one member
EXTENDED = frozenset(
    (
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    )
)
NO_END = "no end: the blocks of zeros that end a tar are missing, so members may be, too"
DAMAGE = (
    *(tarfile.TarError, *compressed.DAMAGE),
    *(ValueError, LookupError, ArithmeticError, RecursionError),  # of tarfile, for fields that no writer writes
)


class TarDamage(Exception):
    """What is wrong with a tar, and where."""


def members_of(stream: BinaryIO, is_wanted: Callable[[str], bool], num_bytes: int | None = None) -> Iterator[Any]:
    """Yield name and content of every file in a tar, which may be compressed (gzip, bzip2, xz, zstd).

    Args:
        stream: the tar.
        is_wanted: says by its name whether a file is read; of others the content is passed over, and empty.
        num_bytes: the size of the stream, if it is known: no more is believed.

    Raises:
        TarDamage: It is not whole; names the byte, of what is uncompressed, and the member.
    """
    forward, place = None, ""
    try:
        forward = _Forward.of(stream, num_bytes)
        tar = tarfile.TarFile(fileobj=forward, tarinfo=_Header)  # type: ignore[arg-type]  # reads, tells and seeks
        while member := tar.next():
            place = f", in member {shown(member.name)}"
            if member.isreg():
                reads = is_wanted(member.name)
                forward.refuse_claims(member, most_bytes=MOST_MEMBER_BYTES if reads else None)
                content = tar.extractfile(member) if reads else None
                yield member.name, content.read() if content else b""
            place = f", after member {shown(member.name)}"
            tar.members = []  # type: ignore[attr-defined]  # else it remembers all of them
        forward.refuse_rest()
    except DAMAGE as error:
        at = 0 if forward is None else forward.tell()
        raise TarDamage(f"{type(error).__name__}: {shown(error)} (read up to byte {at:,}{place})") from error


@final
class _Header(tarfile.TarInfo):
    """The header of a member, refused where tarfile would take it for the end."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Self:
        """Read one block."""
        if not buf:
            raise tarfile.ReadError(NO_END)
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in EXTENDED and header.size > MOST_NAME_BYTES):
            raise tarfile.ReadError(f"a header that claims {header.size:,} bytes")
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """Read the blocks of one member."""
        assert archive.fileobj is not None, "it was opened with one"
        at = archive.fileobj.tell()
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # typeshed lacks it
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no header of a member at byte {at:,}: {error}") from error


@final
class _Forward:
    """A stream that knows its place, as tarfile wants it; it takes memory only for bytes that are there."""

    def __init__(self, stream: BinaryIO, num_bytes: int | None) -> None:
        self._stream, self._num_bytes, self._at = stream, num_bytes, 0

    @staticmethod
    def of(stream: BinaryIO, num_bytes: int | None) -> "_Forward":
        """Decompress a stream that is compressed."""
        buffered = io.BufferedReader(_Raw(stream), PIECE_BYTES)
        if not buffered.peek(1):
            raise tarfile.ReadError("an empty file")
        content = compressed.decompressed(buffered, "a compressed tar")
        return _Forward(content, num_bytes if content is buffered else None)

    def tell(self) -> int:
        """Return the number of bytes read."""
        return self._at

    def seek(self, place: int) -> None:
        """Read on to a place, or to the end if that is nearer."""
        if place < self._at:
            raise tarfile.ReadError("a member that reaches back")
        while self._at < place and self.read(min(place - self._at, PIECE_BYTES)):
            pass

    def read(self, size: int) -> bytes:
        """Return so many bytes, fewer at the end."""
        pieces = []
        while size and (piece := self._stream.read(min(size, PIECE_BYTES))):
            pieces.append(piece)
            self._at += len(piece)
            size -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def refuse_claims(self, member: tarfile.TarInfo, *, most_bytes: int | None) -> None:
        """Refuse a member that claims more than may be read, or than is left of the file."""
        if member.size < 0 or (most_bytes is not None and member.size > most_bytes):
            raise tarfile.ReadError(f"a member that claims {member.size:,} bytes, more than a document may have")
        left = None if self._num_bytes is None else self._num_bytes - member.offset_data
        if left is not None and not member.issparse() and member.size > left:
            raise tarfile.ReadError(f"a member that claims {member.size:,} bytes, where {left:,} are left")

    def refuse_rest(self) -> None:
        """Refuse bytes after the end, which would be lost without a word; reading on checks compressed ones, too."""
        while piece := self.read(PIECE_BYTES):
            if piece.count(0) != len(piece):
                raise tarfile.ReadError("bytes after the end of the tar")


@final
class _Raw(io.RawIOBase):
    """Any object that reads, for a buffer; those of fsspec lack parts of what streams have."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        """Say that this can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read as much as there is at hand."""
        piece = self._stream.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)
