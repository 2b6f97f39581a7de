"""Writes that are on disk when the function returns, described without a second read."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, final

from pydantic import BaseModel, ConfigDict


class FileRecord(BaseModel):
    """Size and digest of one file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    size_bytes: int
    sha256: str


def sync(path: Path) -> None:
    """Force a file to disk, or the names that were created, renamed or removed in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        force(descriptor)
    finally:
        os.close(descriptor)


def force(descriptor: int) -> None:
    """Force what is open to disk; some file systems cannot, mostly for folders, and write when they will."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise


def describe_file(path: Path, *, is_synced: bool) -> FileRecord:
    """Read a file whole for its size and digest; force it to disk unless `is_synced`."""
    with path.open("rb") as file:
        if not is_synced:
            force(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(size_bytes=file.tell(), sha256=digest)


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing and force it to disk at the end; its name is durable once the folder is synced too."""
    with path.open("wb") as file:
        yield file
        file.flush()
        force(file.fileno())


def write_durably(path: Path, content: bytes) -> FileRecord:
    """Write a file and force it to disk; its name is durable once the folder is synced too."""
    with durable_file(path) as file:
        file.write(content)
    return FileRecord(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def replace_durably(path: Path, content: bytes) -> None:
    """Give a file new content at once: readers see the old or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write_durably(temporary, content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@final
class Recorder:
    """Passes bytes on to a file, and knows how many and with which digest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._size_bytes = 0

    def write(self, content: bytes | memoryview) -> None:
        """Write bytes."""
        self._file.write(content)
        self._digest.update(content)
        self._size_bytes += len(content)

    @property
    def record(self) -> FileRecord:
        """Describe what has been written so far."""
        return FileRecord(size_bytes=self._size_bytes, sha256=self._digest.hexdigest())
