"""Values that others wrote, in a form that can be said: what they may be is decided where they are read."""

from pathlib import Path
from typing import Final

MOST_SHOWN: Final = 200  # characters: a message is read by people


def shown(value: object) -> str:
    r"""Return a value from outside on one line, its control characters escaped, cut where it is long.

    >>> print(shown("a\n\x1b[2J"), shown([1, "b"]))
    a\n\x1b[2J [1, 'b']
    """
    text = str(value)
    cut = text[:MOST_SHOWN]
    plain = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in cut)
    return plain if len(cut) == len(text) else f"{plain}… ({len(text):,} characters)"


def bounded_content(path: Path, most_bytes: int) -> bytes:
    """Return what a file holds, read only if it is a regular file of a size that makes sense.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no regular file, or larger.
    """
    if not path.is_file():  # a pipe would be waited for, a device read for ever
        if path.exists():
            raise ValueError("no regular file")
        raise FileNotFoundError(2, "No such file or directory", str(path))
    with path.open("rb") as file:
        content = file.read(min(most_bytes, path.stat().st_size) + 1)
    if len(content) > most_bytes:
        raise ValueError(f"more than {most_bytes:,} bytes")
    return content
