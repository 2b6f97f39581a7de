"""Files and values that somebody else may have written: read within bounds, and said so that they can be printed."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final

MOST_JSON_BYTES: Final = 2**26
"""The index of a model of hundreds of layers, each with hundreds of experts, takes about 2**24."""
MOST_SHOWN: Final = 200
LONGEST_VALUE: Final = 80
TOO_DEEP: Final = "brackets nested too deep"
NO_TEXT: Final = "bytes that are not UTF-8 text"


class OddFileError(ValueError):
    """A file that is not what its name promises; says in a few words what it is."""


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a file to be read in bytes, without waiting for the other end of a FIFO.

    Raises:
        OSError: It cannot be opened.
        OddFileError: It is a folder, a FIFO or a device.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OddFileError("a folder, a FIFO or a device in place of a file")
    with os.fdopen(handle, "rb") as file:
        yield file


def read_bounded(path: Path, most_bytes: int) -> bytes:
    """Read a file whole.

    Raises:
        OSError: It cannot be read.
        OddFileError: It is no regular file, or larger than it can be.
    """
    with open_regular(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > most_bytes:
            raise OddFileError(f"{size_bytes:,} bytes, where at most {most_bytes:,} are read")
        return file.read(size_bytes)


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        OSError: It cannot be read.
        OddFileError: It is something else.
    """
    content = read_bounded(path, most_bytes)
    try:
        return json.loads(content)
    except UnicodeDecodeError:
        raise OddFileError(NO_TEXT) from None
    except json.JSONDecodeError as error:
        raise OddFileError(f"no JSON ({error})") from None
    except ValueError:
        raise OddFileError("a number of too many digits") from None
    except RecursionError:
        raise OddFileError(TOO_DEEP) from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        OSError: It cannot be read.
        OddFileError: It is something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise OddFileError(f"{described(value)} in place of an object")
    return value


def shown(value: object) -> str:
    r"""Return a text from outside on one line, its control characters escaped, cut where it is long.

    >>> print(shown("a\n\x1b[2J"), shown([1, "b"]))
    a\n\x1b[2J [1, 'b']
    """
    text = str(value)
    cut = text[:MOST_SHOWN]
    plain = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in cut)
    return plain if len(cut) == len(text) else f"{plain}… ({len(text):,} characters)"


def described(value: object) -> str:
    """Say what a value of any type, depth and length is, in a few words.

    >>> described("x" * 200)[-30:], described([[1]]), described(None)
    ('xxxxxxxxxx... (202 characters)', 'a list', 'null')
    """
    plain = {dict: "an object", list: "a list", type(None): "null"}
    if (words := plain.get(type(value))) is not None:
        return words
    try:
        text = repr(value)
    except ValueError:  # of an integer with too many digits for Python to write out
        return "an integer of thousands of digits"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}... ({len(text):,} characters)"


def reason_of(error: Exception) -> str:
    """Say in words why a file could not be read.

    >>> reason_of(FileNotFoundError(2, "No such file or directory"))
    'no such file or directory'
    """
    said = error.strerror if isinstance(error, OSError) else None
    return said.lower() if said else str(error)
