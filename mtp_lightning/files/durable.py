"""Writes that are on disk when the function returns, described without a second read."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, final

from pydantic import BaseModel, ConfigDict

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Refusals of writes, and of nothing else."""


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
def naming(path: Path) -> Iterator[None]:
    """Let a refusal to write to a file that is open name it, which the system does not do."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in NO_ROOM:
            error.filename = str(path)
        raise


@contextmanager
def durable_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing and force it to disk at the end; its name is durable once the folder is synced too."""
    with naming(path), path.open("wb") as file:
        yield file
        file.flush()
        force(file.fileno())


@contextmanager
def finished_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing under a name of this process's own; it gets its name when the body ends, on disk.

    Where the body raises, or the system refuses a write, nothing of it is left. Folders above it are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with finished_name(path) as unfinished, durable_file(unfinished) as file:
        yield file


@contextmanager
def finished_name(path: Path) -> Iterator[Path]:
    """Yield a name, with the same ending, for a file that somebody else writes; it gets its own when the body ends."""
    unfinished = path.with_name(f"{os.getpid()}.{path.name}")
    with removed_on_refusal(unfinished, path):
        yield unfinished
        unfinished.rename(path)


@contextmanager
def removed_on_refusal(unfinished: Path, path: Path) -> Iterator[None]:
    """Remove an unfinished file when the body raises; a refusal names the file that it was to be."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        if isinstance(error, OSError) and error.filename == str(unfinished):
            error.filename = str(path)
        raise


def write_durably(path: Path, content: bytes) -> FileRecord:
    """Write a file and force it to disk; its name is durable once the folder is synced too."""
    with durable_file(path) as file:
        file.write(content)
    return FileRecord(size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())


def replace_durably(path: Path, content: bytes) -> None:
    """Give a file new content at once: readers see the old or the new, never a part."""
    _replace(path, content, path.with_name(path.name + ".tmp"))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that somebody named, and the folders above it: an old one is replaced at once, or stays as it was.

    A link is followed, and an old file keeps its mode. What is there and is no file, as a pipe or a device, takes the
    content as it comes, and so does a file whose folder takes no other.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if _is_descriptor(path) or (path.exists() and not path.is_file()):
        path.write_bytes(content)
        return
    target = path.resolve()
    try:
        _replace(target, content, target.with_name(f".mtp-{os.getpid()}.tmp"))
    except OSError as error:
        if error.errno not in CLOSED_FOLDER or not target.exists():
            raise
        target.write_bytes(content)


def _is_descriptor(path: Path) -> bool:
    """Tell whether a path is another name of a file that a process has open, as /dev/stdout and /dev/fd/3 are."""
    for _ in range(MOST_LINKS):
        if not path.is_symlink():
            break
        if path.parent.resolve().is_relative_to("/proc"):
            return True
        path = path.parent / path.readlink()
    return False


MOST_LINKS = 40  # one behind the other, as Linux has it


CLOSED_FOLDER = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY)
"""Answers of a folder in which nothing can be renamed; the last is that of a file which is mounted by itself."""


def _replace(path: Path, content: bytes, temporary: Path) -> None:
    with removed_on_refusal(temporary, path):
        write_durably(temporary, content)
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
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
