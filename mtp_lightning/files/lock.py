"""One process at a time: locks on open files and folders, which the kernel releases when their holder dies."""

import fcntl
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TextIO

_ENTRY = re.compile(r"^\d+: FLOCK .* (\d+) ([0-9a-f]+):([0-9a-f]+):(\d+) \d+ \S+$", re.MULTILINE)
ANOTHER = "another process"

Lockable = int | BinaryIO | TextIO  # a descriptor or an open file
FileId = tuple[int, int, int]  # major, minor, inode


def try_lock(file: Lockable) -> bool:
    """Lock an open file or folder for this process alone; return whether it is, at once.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def wait_for_lock(
    file: Lockable, *, shared: bool = False, on_waiting: Callable[[str], None] = lambda holder: None
) -> None:
    """Lock an open file or folder; tell `on_waiting` who holds it if that takes waiting.

    Args:
        file: what to lock.
        shared: let others hold it shared at the same time, and nobody alone.
        on_waiting: called once, with words for the holder.

    Raises:
        OSError: the file system has no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        on_waiting(holder_of(file))
        fcntl.flock(file, kind)


def holder_of(file: Lockable) -> str:
    """Say which process of this machine holds an open file's lock, with its command; else `another process`."""
    pid = locked_files().get(file_id(os.fstat(file if isinstance(file, int) else file.fileno())))
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
    descriptor = file if isinstance(file, int) else file.fileno()
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
