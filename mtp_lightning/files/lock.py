"""One process at a time: locks on open files and folders, which the kernel releases when their holder dies.

Some file systems have none (Lustre with noflock, NFS without its lock service): that is said once, and nobody is kept
out there.
"""

import errno
import fcntl
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import BinaryIO, TextIO

_ENTRY = re.compile(r"^\d+: FLOCK .* (\d+) ([0-9a-f]+):([0-9a-f]+):(\d+) \d+ \S+$", re.MULTILINE)
ANOTHER = "another process"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.EBADF}
"""What `flock` answers where there are none; NFS, whose locks need a file open for writing, says EBADF of others."""

Lockable = int | BinaryIO | TextIO  # a descriptor or an open file
FileId = tuple[int, int, int]  # major, minor, inode


def try_lock(file: Lockable, *, without_locks: bool = True) -> bool:
    """Lock an open file or folder for this process alone; return whether it is, at once.

    Args:
        file: what to lock.
        without_locks: what to return where the file system has no locks.
    """
    try:
        return _lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB) or without_locks
    except BlockingIOError:
        return False


def wait_for_lock(
    file: Lockable, *, shared: bool = False, on_waiting: Callable[[str], None] = lambda holder: None
) -> None:
    """Lock an open file or folder; tell `on_waiting` who holds it if that takes waiting.

    Args:
        file: what to lock.
        shared: let others hold it shared at the same time, and nobody alone.
        on_waiting: called once, with words for the holder.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        _lock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        on_waiting(holder_of(file))
        _lock(file, kind)


def _lock(file: Lockable, operation: int) -> bool:
    """Lock a file, and return True; where its file system has no locks say so once, and return False."""
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _say_unlocked(_descriptor(file), error)
        return False
    return True


@cache
def _say_once(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_unlocked(descriptor: int, error: OSError) -> None:
    path = Path(f"/proc/self/fd/{descriptor}").readlink()
    mount = next(folder for folder in (path, *path.parents) if folder.is_mount() or folder == folder.parent)
    _say_once(
        f"The file system of {mount} has no locks ({error.strerror}): what lies there is not kept from a second "
        "process at work on it"
    )


def _descriptor(file: Lockable) -> int:
    return file if isinstance(file, int) else file.fileno()


def holder_of(file: Lockable) -> str:
    """Say which process of this machine holds an open file's lock, with its command; else `another process`."""
    pid = locked_files().get(file_id(os.fstat(_descriptor(file))))
    if not pid:  # a process of another machine, or of another container
        return ANOTHER
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        command = ""
    return f"process {pid} ({command})" if command else f"process {pid}"


def locked_files() -> dict[FileId, int]:
    """List the files that processes of this machine hold locks on, each with the process."""
    try:
        table = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return {}
    return {(int(match[2], 16), int(match[3], 16), int(match[4])): int(match[1]) for match in _ENTRY.finditer(table)}


def file_id(status: os.stat_result) -> FileId:
    """Name a file as `locked_files` does."""
    return os.major(status.st_dev), os.minor(status.st_dev), status.st_ino


def is_file_at(file: Lockable, path: Path) -> bool:
    """Tell whether a path leads to an open file, which may have been renamed or removed since."""
    return path.exists() and os.path.samestat(os.fstat(_descriptor(file)), path.stat())
