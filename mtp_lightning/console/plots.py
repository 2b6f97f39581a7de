"""Pictures on the disk."""

from pathlib import Path
from typing import TYPE_CHECKING

from mtp_lightning.errors import RunFolderError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_picture(figure: "Figure", path: Path, option: str) -> None:
    """Write a picture where an option of the command line says.

    Raises:
        RunFolderError: It cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise RunFolderError(
            "the file for the picture must be writable", f"{path}: {error.strerror}", f"Give another path to {option}."
        ) from error
