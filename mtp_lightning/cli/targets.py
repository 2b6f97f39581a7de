"""Files that an option names to be written: looked at when the command line is read, before any work is done."""

import os
from pathlib import Path
from typing import Annotated

import typer

from mtp_lightning.console.errors import finish_without_output
from mtp_lightning.console.tables import STDOUT
from mtp_lightning.errors import RunFolderError

PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp", ".eps", ".ps", ".tif", ".tiff")
PAGES = (".html", ".htm")


def check_file(option: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuse a file that cannot be written; folders above it may be missing.

    Raises:
        RunFolderError: says why it cannot be written.
    """
    if path is None:
        return None
    try:
        found = "-, which this option does not take for stdout" if str(path) == "-" else _obstacle(path)
    except (OSError, ValueError) as error:  # a name that no file can have, or a folder that is closed
        found = f"{path}: {error.strerror if isinstance(error, OSError) else error}"
    if found is not None:
        name = option.opts[-1]
        raise RunFolderError(f"the file for {name} must be writable", found, f"Give another path to {name}")
    finish_without_output()
    return path


def check_file_or_stdout(option: typer.CallbackParam, path: Path | None) -> Path | None:
    """Do the same, where `-` stands for stdout."""
    return path if path == STDOUT else check_file(option, path)


def check_picture(option: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuse a picture that cannot be written, or whose name has no ending that says of what kind it is.

    Raises:
        RunFolderError: says why it cannot be written.
    """
    return _with_ending(PICTURES, option, path)


def check_page(option: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuse a page that cannot be written, or whose name is that of something else: a run's own file, perhaps.

    Raises:
        RunFolderError: says why it cannot be written.
    """
    return _with_ending(PAGES, option, path)


def _with_ending(endings: tuple[str, ...], option: typer.CallbackParam, path: Path | None) -> Path | None:
    checked = check_file(option, path)
    if checked is not None and checked.suffix.lower() not in endings:
        name = option.opts[-1]
        expected = f"the file for {name} must end in {', '.join(endings)}"
        raise RunFolderError(expected, str(path), f"Write e.g. {name} {checked.stem}{endings[0]}")
    return checked


JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", callback=check_file, help="Write the figures here, too.")
]


def _obstacle(path: Path) -> str | None:
    """Say what keeps a file from being written, if anything does."""
    if path.exists():
        return f"{path}, a folder" if path.is_dir() else _closed(path, path)
    nearest = next(folder for folder in path.parents if folder.exists())
    if not nearest.is_dir():
        return f"{path}, beneath the file {nearest}"
    return _closed(path, nearest)


def _closed(path: Path, place: Path) -> str | None:
    return None if os.access(place, os.W_OK) else f"{path}: no permission to write to {place}"
