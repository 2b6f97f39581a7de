"""Folders that appear under their name whole, by one rename, or not at all.

    TARGET.partial  --write and fsync every file-->  fsync the folder  --rename-->  TARGET  --fsync the parent-->  done

A process killed before the rename leaves a staging folder, whose name says that it is one; killed after it, the whole
target. A folder that is replaced or deleted is renamed `.removed` first: half of one never bears its name either.
"""

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from mtp_lightning.errors import MtpError, refusal_of
from mtp_lightning.files.durable import sync
from mtp_lightning.files.lock import holder_of, is_file_at, try_lock

STAGING_SUFFIX = ".partial"
ASIDE_SUFFIX = ".removed"


@contextmanager
def atomic_folder(target: Path, error: type[MtpError], *, size_bytes: int = 0) -> Iterator[Path]:
    """Yield an empty staging folder that is named `target` when the body ends, and removed when the body raises.

    The body forces its files to disk. What an earlier process left in the staging folder is removed.

    Raises:
        MtpError: of type `error`: the file system refuses a write, or has less than `size_bytes` free, or another
            process writes the same folder.
    """
    target = target.resolve()
    staging = staging_path(target)
    try:
        if target.is_mount():
            raise OSError("it is a mount point, and the folder is made beside it and renamed; name one in it")
        with _held(staging, target, error), removed_on_error(staging):
            for left in staging.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            if (free_bytes := shutil.disk_usage(staging).free) < size_bytes:
                raise OSError(f"{free_bytes / 2**20:,.1f} MiB free there of {size_bytes / 2**20:,.1f} MiB needed")
            try:
                yield staging
                publish(staging, target)
            except OSError as refusal:  # told before what was written is removed: there is room again afterwards
                raise _unwritable(target, refusal, error) from refusal
    except OSError as refusal:
        raise _unwritable(target, refusal, error) from refusal


def _unwritable(target: Path, refusal: OSError, error: type[MtpError]) -> MtpError:
    found = str(refusal) if refusal.errno is None else refusal_of(refusal, target)
    return error(f"the folder must be written to {target}", found, "Make room or repair access, or name another")


@contextmanager
def _held(staging: Path, target: Path, error: type[MtpError]) -> Iterator[None]:
    """Make a staging folder unless it is there, and keep other processes out of it."""
    with ExitStack() as stack:
        while True:
            staging.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, descriptor)
            if not try_lock(descriptor):
                raise error(
                    f"one process at a time may write {target}",
                    f"{holder_of(descriptor)} is at it",
                    "Wait for it to end, or name another folder",
                )
            if is_file_at(descriptor, staging):  # else the one that held it has given it its name, or removed it
                break
        yield


def check_new_folder(target: Path, error: type[MtpError]) -> None:
    """Refuse to write over anything: a target must be missing or empty.

    Raises:
        MtpError: of type `error`.
    """
    if target.is_dir() and (num_entries := sum(1 for _ in target.iterdir())):
        found = f"a folder with {num_entries:,} {'entry' if num_entries == 1 else 'entries'}"
    elif target.exists() and not target.is_dir():
        found = "a file"
    else:
        return
    raise error(
        "the folder to write must be new or empty", f"{found}: {target}", "Name another folder, or move that away"
    )


def check_staging(staging: Path, own_names: Collection[str], error: type[MtpError]) -> None:
    """Refuse a staging folder that no killed process left: one that holds anything but `own_names` is somebody's.

    Names may be patterns, as `*.json`.

    Raises:
        MtpError: of type `error`.
    """
    if not staging.is_dir() or not all(
        any(fnmatchcase(path.name, own) for own in own_names) for path in staging.iterdir()
    ):
        check_new_folder(staging, error)


def staging_path(target: Path, identity: str = "") -> Path:
    """Name the folder beside `target` that it is written in, one for each `identity`."""
    target = target.absolute()
    return target.with_name(target.name + STAGING_SUFFIX + (f"-{identity}" if identity else ""))


def make_empty(folder: Path) -> None:
    """Begin a folder with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


@contextmanager
def removed_on_error(folder: Path) -> Iterator[None]:
    """Remove a folder when the body raises."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def publish(staging: Path, target: Path, *, replace: bool = False) -> None:
    """Give a staging folder, whose files are on disk, its name; durable when this returns.

    Raises:
        OSError: the target is taken and not to be replaced, or the file system refuses.
    """
    sync(staging)
    former = _set_aside(target) if replace and target.exists() else None
    staging.rename(target)  # replaces an empty folder, refuses any other
    sync(target.parent)
    if former:
        shutil.rmtree(former, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder, so that a half-deleted one never bears its name."""
    shutil.rmtree(_set_aside(folder), ignore_errors=True)


def _set_aside(folder: Path) -> Path:
    aside = folder.with_name(folder.name + ASIDE_SUFFIX)
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)
