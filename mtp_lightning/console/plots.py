"""Pictures on the disk."""

from pathlib import Path
from typing import TYPE_CHECKING

from mtp_lightning.errors import RunFolderError, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def label_of(name: str) -> str:
    r"""Name what is drawn, where matplotlib would take $ for mathematics and leave out what begins with _.

    >>> print(label_of("_a$\x1b"))
     _a\$\x1b
    """
    return " " * name.startswith("_") + visible(name, kept="").replace("$", r"\$")


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
