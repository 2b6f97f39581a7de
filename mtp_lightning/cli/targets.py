"""Files that an option names to be written: looked at before any work is done for them."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtp_lightning.errors import RunFolderError

PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".eps", ".ps", ".tif", ".tiff")


def check_target(path: Path | None, option: str, *, endings: Sequence[str] = (), makes_folders: bool = False) -> None:
    """Refuse a file that cannot be written.

    Args:
        path: the file; None is nothing to check.
        option: the option that names it.
        endings: what its name must end in; none means anything.
        makes_folders: folders above it may be missing.

    Raises:
        RunFolderError: says why it cannot be written.
    """
    if path is None:
        return
    try:
        found = _obstacle(path, makes_folders=makes_folders)
    except OSError as error:  # a name that no file can have, or a folder that is closed
        found = f"{path}: {error.strerror}"
    if found is not None:
        raise _refusal(option, found)
    if endings and path.suffix.lower() not in endings:
        expected = f"the file for {option} must end in {', '.join(endings)}"
        raise RunFolderError(expected, str(path), f"Write e.g. {option} {path.stem}{endings[0]}")


def write_json(value: Any, path: Path, option: str) -> None:
    """Write a value in JSON where an option says.

    Raises:
        RunFolderError: It cannot be written there.
    """
    try:
        path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise _refusal(option, f"{path}: {error.strerror}") from error


def _obstacle(path: Path, *, makes_folders: bool) -> str | None:
    """Say what keeps a file from being written, if anything does."""
    if path.exists():
        return f"{path}, a folder" if path.is_dir() else _closed(path, path)
    nearest = next(folder for folder in path.parents if folder.exists())
    if not nearest.is_dir():
        return f"{path}, beneath the file {nearest}"
    if not makes_folders and nearest != path.parent:
        return f"{path}, without a folder {path.parent}"
    return _closed(path, nearest)


def _closed(path: Path, place: Path) -> str | None:
    return None if os.access(place, os.W_OK) else f"{path}: no permission to write to {place}"


def _refusal(option: str, found: str) -> RunFolderError:
    return RunFolderError(f"the file for {option} must be writable", found, f"Give another path to {option}")
