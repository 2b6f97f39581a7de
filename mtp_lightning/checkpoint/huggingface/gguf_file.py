"""What GGUF files of llama.cpp say before their first tensor; nothing in them is believed before it is checked."""

import math
import os
import re
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, final

import numpy as np

from mtp_lightning.checkpoint.format.read_shards import MOST_NAMES
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.untrusted import NO_TEXT, OddFileError, described, open_regular, reason_of

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
NUMBERS = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8")
"""Types of values by their number in the format."""
MOST_HEADER_BYTES = 2**28
"""The vocabulary of 256,000 tokens with its merges takes about 2**24."""
MOST_KEYS = 2**16
MOST_TENSORS = 2**18
MOST_NAME_BYTES = 2**16
MOST_AXES = 4
MOST_ALIGNMENT = 2**20
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
_STARTS = {
    b"version https://git-lfs": "a pointer of Git LFS: the file itself has not been downloaded",
    b"PK": "a ZIP archive or a pickle of torch",
    b"<": "a page of HTML",
    b"FUGG": "GGUF of a machine with another byte order",
    **dict.fromkeys((b"tjgg", b"lmgg", b"fmgg", b"ggjt", b"ggml", b"ggmf"), "a GGML file from before GGUF"),
}


class GGUFTensor(NamedTuple):
    """Where a tensor lies in a file, and how it is stored."""

    kind: int  # number of its type in the format
    shape: tuple[int, ...]  # slowest axis first, as in torch
    offset: int  # from the beginning of the data


class GGUFHeader(NamedTuple):
    """What one file says."""

    path: Path
    values: dict[str, Any]  # numbers, truth values, texts, lists of texts and arrays of numbers
    tensors: dict[str, GGUFTensor]
    data_begin: int  # position of the first tensor
    size_bytes: int


def read_gguf(path: Path) -> list[GGUFHeader]:
    """Read the header of a file, and of the others where a model is split into several; the first comes first.

    Raises:
        CheckpointError: a file is not GGUF, damaged, or not of this byte order, or one of several is missing.
    """
    header = _read_file(path)
    count = header.values.get("split.count", 1)
    if type(count) is not int or count < 2:
        return [header]
    match = SPLIT.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise CheckpointError(
            f"a file of a model in {described(count)} files must be named NAME-00001-of-{count:05d}.gguf",
            str(path),
            "Give the files the names that they were published under, or merge them: llama-gguf-split --merge",
        )
    paths = [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}.gguf") for number in range(1, count + 1)]
    if missing := [one.name for one in paths if not one.is_file()]:
        more = f" and {len(missing) - MOST_NAMES} more" if len(missing) > MOST_NAMES else ""
        raise CheckpointError(
            "every file of a split model must be there",
            f"no {', '.join(missing[:MOST_NAMES])}{more} in {path.parent}",
            "Download what is missing",
        )
    headers = [_read_file(one) for one in paths]
    _check_split(headers)
    return headers


def _check_split(headers: Sequence[GGUFHeader]) -> None:
    names: dict[str, Path] = {}
    for number, header in enumerate(headers):
        told = [header.values.get(f"split.{name}") for name in ("no", "count")]
        twice = [name for name in header.tensors if name in names]
        if told != [number, len(headers)] or twice:
            found = f"{described(twice[0])} in two files" if twice else f"split.no and split.count {told}"
            raise _damaged(header.path, found)
        names |= dict.fromkeys(header.tensors, header.path)
    total = headers[0].values.get("split.tensors.count", len(names))
    if total != len(names):
        raise _damaged(headers[0].path, f"split.tensors.count {described(total)} beside {len(names):,} tensors")


def _read_file(path: Path) -> GGUFHeader:
    try:
        with open_regular(path) as file:
            return _Parser(file).header(path)
    except OSError as error:
        found = f"{path}: {reason_of(error)}"
        raise CheckpointError("a file to import must be readable", found, "Correct the path or permissions") from None
    except OddFileError as error:
        raise _damaged(path, str(error)) from None


def _damaged(path: Path, found: str) -> CheckpointError:
    hint = "Download the file again, whole"
    if "byte order" in found:
        hint = f"Convert it on a machine of its own: gguf-convert-endian {path.name} little"
    elif "from before" in found or "version" in found:
        hint = "Take a newer release of it, or convert the model again with llama.cpp"
    return CheckpointError("a *.gguf file must be as llama.cpp writes it", f"{found}, in {path}", hint)


@final
class _Parser:
    """Reads a header from its beginning to its end; no read goes beyond the file, or the largest header."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.size_bytes = os.fstat(file.fileno()).st_size
        self._left = min(self.size_bytes, MOST_HEADER_BYTES)

    def header(self, path: Path) -> GGUFHeader:
        """Read the header.

        Raises:
            OddFileError: it is something else.
        """
        num_tensors, num_keys = self._beginning()
        values: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._text(MOST_NAME_BYTES)
            if key in values:
                raise OddFileError(f"the key {described(key)} given again")
            values[key] = self._value(self._number("<I"), key)
        tensors: dict[str, GGUFTensor] = {}
        for _ in range(num_tensors):
            name = self._text(MOST_NAME_BYTES)
            if name in tensors:
                raise OddFileError(f"the tensor {described(name)} given again")
            tensors[name] = self._tensor(name)
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= MOST_ALIGNMENT or alignment & (alignment - 1):
            raise OddFileError(f"general.alignment {described(alignment)} (a power of two is meant)")
        begin = -(-self._file.tell() // alignment) * alignment
        return GGUFHeader(path, values, tensors, begin, self.size_bytes)

    def _beginning(self) -> tuple[int, int]:
        start = self._file.read(32)
        self._file.seek(4)
        self._left -= 4
        if start[:4] != MAGIC:
            known = (what for begin, what in _STARTS.items() if start.startswith(begin))
            raise OddFileError(next(known, f"a file that begins with {described(start[:8])}"))
        version = self._number("<I")
        if version & 0xFFFF == 0 and version:
            raise OddFileError("GGUF of a machine with another byte order (big-endian)")
        if version not in VERSIONS:
            raise OddFileError(f"version {version:,} of the format (2 and 3 are read)")
        num_tensors, num_keys = self._number("<Q"), self._number("<Q")
        for count, most, what in ((num_tensors, MOST_TENSORS, "tensors"), (num_keys, MOST_KEYS, "keys")):
            if count > most:
                raise OddFileError(f"{count:,} {what} (at most {most:,} are read)")
        return num_tensors, num_keys

    def _take(self, num_bytes: int) -> bytes:
        if num_bytes > self._left:
            what = "the file" if self.size_bytes <= MOST_HEADER_BYTES else f"the {MOST_HEADER_BYTES:,} that are read"
            raise OddFileError(f"a header that asks for {num_bytes:,} more bytes than {what} has left ({self._left:,})")
        self._left -= num_bytes
        return self._file.read(num_bytes)

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _text(self, most: int = MOST_HEADER_BYTES) -> str:
        length = self._number("<Q")
        if length > most:
            raise OddFileError(f"a text of {length:,} bytes (at most {most:,} are read)")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise OddFileError(NO_TEXT) from None

    def _value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            return self._numbers(kind, 1, key)[0].item()
        inner, count = self._number("<I"), self._number("<Q")
        if inner != STRING:
            return self._numbers(inner, count, key)
        if 8 * count > self._left:
            raise OddFileError(f"{count:,} texts under {described(key)}, more than the file can hold")
        return [self._text() for _ in range(count)]

    def _numbers(self, kind: int, count: int, key: str) -> Any:
        form = NUMBERS[kind] if kind < len(NUMBERS) else None
        if form is None:
            raise OddFileError(f"a value of the unknown type {kind} under {described(key)}")
        return np.frombuffer(self._take(count * np.dtype(form).itemsize), dtype=form)

    def _tensor(self, name: str) -> GGUFTensor:
        num_axes = self._number("<I")
        if not 0 < num_axes <= MOST_AXES:
            raise OddFileError(f"{described(name)} with {num_axes:,} axes (1 to {MOST_AXES} are meant)")
        axes = [self._number("<Q") for _ in range(num_axes)]
        if 0 in axes or math.prod(axes) >= 2**59:
            raise OddFileError(f"{described(name)} with the impossible shape {axes[::-1]}")
        kind = self._number("<I")
        return GGUFTensor(kind, tuple(axes[::-1]), self._number("<Q"))


def check_places(header: GGUFHeader, ends: dict[str, tuple[int, int]]) -> None:
    """Check that every tensor lies inside the file, and no two in the same bytes.

    Args:
        header: the file's.
        ends: positions of the first byte of each tensor, and of the one after its last.

    Raises:
        CheckpointError: they do not.
    """
    for name, (_, end) in ends.items():
        if end > header.size_bytes:
            found = f"an end after {header.size_bytes:,} bytes, of {end:,} with {described(name)}"
            raise _damaged(header.path, found)
    order = sorted(ends, key=lambda name: ends[name])
    for name, follower in pairwise(order):
        if ends[follower][0] < ends[name][1]:
            raise _damaged(header.path, f"{described(follower)} and {described(name)} in the same bytes")
