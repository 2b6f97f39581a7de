"""Arrays that others wrote: what a header claims is compared with the bytes that are there, before any is taken."""

import io
import math
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

Numbers = NDArray[np.integer[Any]]


def whole_numbers(content: bytes) -> Numbers:
    """Return the flat array of whole numbers that the content of a `.npy` file is, without copying it.

    Raises:
        ValueError: It is none, or claims other bytes than there are.
    """
    shape, _, dtype, begin = header_of(content)
    if len(shape) != 1 or dtype.kind not in "iu":
        raise ValueError(f"{len(shape)} dimensions of {dtype}, where one of whole numbers is wanted")
    claimed_bytes = math.prod(shape) * dtype.itemsize
    if min(shape) < 0 or claimed_bytes != len(content) - begin:
        raise ValueError(f"{shape[0]:,} numbers of {dtype}, {claimed_bytes:,} bytes, in {len(content) - begin:,} bytes")
    return np.frombuffer(content, dtype=dtype, offset=begin)


def arrays_of(path: Path, names: Iterable[str]) -> dict[str, Numbers]:
    """Read flat arrays of whole numbers from a `.npz` file that holds them uncompressed; no more bytes than it has.

    Raises:
        OSError: It cannot be read.
        ValueError: It is damaged, lacks one, or one claims other bytes than there are.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "No such file" if not path.exists() else "Not a regular file", str(path))
    num_bytes = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as parts:
            contents = {name: _content(parts, f"{name}.npy", num_bytes) for name in names}
    except (EOFError, KeyError, OverflowError, RuntimeError, struct.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    arrays = {}
    for name, content in contents.items():
        try:
            arrays[name] = whole_numbers(content)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return arrays


def _content(parts: zipfile.ZipFile, name: str, num_bytes: int) -> bytes:
    part = parts.getinfo(name)
    if part.compress_type != zipfile.ZIP_STORED:  # a few bytes could become any number of them
        raise ValueError(f"{name} is compressed")
    if part.file_size > num_bytes:
        raise ValueError(f"{name} claims {part.file_size:,} bytes of a file of {num_bytes:,}")
    return parts.read(part)


def header_of(content: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return shape, whether columns come first, type, and where the numbers begin.

    Raises:
        ValueError: The content has no such header, of version 1 or 2.
    """
    stream = io.BytesIO(content)
    version = npy.read_magic(stream)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version[0]}.{version[1]} of the format")
    try:
        shape, in_columns, dtype = readers[version](stream)
    except (SyntaxError, TypeError, RecursionError, MemoryError, OverflowError) as error:  # of a header that is parsed
        raise ValueError(f"a header that cannot be read: {type(error).__name__}") from error
    return shape, in_columns, dtype, stream.tell()
