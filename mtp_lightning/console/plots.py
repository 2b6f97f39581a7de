"""Pictures on the disk, and lines drawn with characters."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtp_lightning.errors import RunFolderError, refusal_of, remedy_of, visible
from mtp_lightning.files.durable import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SAMPLES, HEIGHT = 61, 10  # columns and rows of a line drawn with characters
EIGHTHS = " ▁▂▃▄▅▆▇█"


def text_plot(values: Sequence[float], first: str, last: str) -> list[str]:
    """Draw values >= 0 as one bar of characters each, at most SAMPLES of them, with names of the first and the last.

    >>> [line.strip() for line in text_plot([1.0, 2.0, 1.5], "1", "3")][-3:]
    ['│███', '0 ┼───', '1 3']
    """
    top = max(values) or 1.0
    levels = [math.ceil(8 * HEIGHT * value / top - 1e-9) for value in values]
    rows = []
    for row in reversed(range(HEIGHT)):
        label = f"{top * (row + 1) / HEIGHT:.3g}" if (row + 1) % (HEIGHT // 2) == 0 else ""
        rows.append(f"{label:>10} │{''.join(EIGHTHS[max(0, min(8, level - 8 * row))] for level in levels)}".rstrip())
    gap = max(1, len(values) - len(first) - len(last))
    return [*rows, f"{0:>10} ┼{'─' * len(values)}", f"{'':>11} {first}{' ' * gap}{last}"]


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
        write_whole(path, picture_of(figure, path))
    except OSError as error:
        raise RunFolderError(
            "the file for the picture must be writable", refusal_of(error, path), remedy_of(error, option)
        ) from error


def picture_of(figure: "Figure", path: Path) -> bytes:
    """Draw a figure, of the kind that the ending of a path names."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix.removeprefix(".").lower())
    return drawn.getvalue()
