"""Writes that are on disk when the function returns."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make names created, renamed or removed in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and force it to disk; its name is durable once the folder is synced too."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, content: bytes) -> None:
    """Give a file new content at once: readers see the old or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    write_durably(temporary, content)
    temporary.replace(path)
    sync_folder(path.parent)
