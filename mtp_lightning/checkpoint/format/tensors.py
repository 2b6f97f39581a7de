"""Safetensors files, written and read one tensor at a time.

The library's writer brings all tensors to the CPU (before 0.8: into Python bytes) before it writes the first,
wants them contiguous, and reports a full disk as an error of its own. This one holds one tensor at a time and
lets OSError through. Reading is into memory of its own, not a map: a file can go while its tensors live.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from mtp_lightning.checkpoint.format.manifest import DamagedCheckpointError
from mtp_lightning.files.durable import FileRecord, Recorder
from mtp_lightning.files.untrusted import TOO_DEEP, OddFileError, described, open_regular

NAME_OF_DTYPE = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}
BLOCK_BYTES = 2**22  # of values that are read, checked or converted at a time where a tensor may be large
MOST_HEADER_BYTES = 100_000_000  # as the library has it
MOST_AXES = 64
NO_TENSORS = {
    rb"version https://git-lfs": ("a pointer of Git LFS", "Fetch what it stands for: git lfs pull"),
    rb"(?i)\s*<(!doctype|html|\?xml|!--)": (
        "a web page",
        "Log in, accept the licence there may be, and download it again",
    ),
    rb"PK\x03\x04|\x80[\x02-\x05]": ("a pickle of torch", "Take a release with real *.safetensors"),
    rb"GGUF": ("GGUF, for llama.cpp", "Name it *.gguf, and give it in place of the folder"),
    rb"\x1f\x8b|\x28\xb5\x2f\xfd|BZh|\xfd7zXZ": ("a compressed file", "Unpack it"),
}
"""Beginnings of what is found in place of tensors: what it is, and what to do."""

_DTYPE_OF_NAME = {name: dtype for dtype, name in NAME_OF_DTYPE.items()}


class Entry(NamedTuple):
    """Where a tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # position of the first byte, counted from the file's beginning
    end: int


class Header(NamedTuple):
    """What a safetensors file says before its first tensor."""

    entries: dict[str, Entry]  # in the order in which the tensors lie
    metadata: dict[str, str]


def build_header(
    forms: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[str]]:
    """Build the first bytes of a file from the tensors' dtypes and shapes; return the order to write them in too."""
    order = sorted(forms, key=lambda name: (-forms[name][0].itemsize, name))  # widest first keeps all aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name in order:
        dtype, shape = forms[name]
        end = position + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAME_OF_DTYPE[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> FileRecord:
    """Write tensors of any device and stride in safetensors format; holds a copy of one at a time.

    The digest is taken on the way: no second read.
    """
    recorder = Recorder(file)
    header, order = build_header({name: (one.dtype, one.shape) for name, one in tensors.items()}, metadata)
    recorder.write(header)
    for name in order:
        recorder.write(memory_of(tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()))
    return recorder.record


def read_header(path: Path) -> Header:
    """Read what a safetensors file says about its tensors; nothing in it is believed before it is checked.

    Raises:
        DamagedCheckpointError: the file ends early or is not in this format.
    """
    try:
        with open_regular(path) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > min(size_bytes - 8, MOST_HEADER_BYTES):
                file.seek(0)
                beginning = file.read(512)
                for pattern, (what, hint) in NO_TENSORS.items():
                    if re.match(pattern, beginning):
                        raise _unreadable(path, what, hint)
                raise OddFileError(f"a header of {header_bytes:,} bytes at the beginning of {size_bytes:,}")
            return _parse_header(file.read(header_bytes), (8 + header_bytes, size_bytes))
    except OddFileError as error:
        raise _unreadable(path, str(error)) from None
    except RecursionError:
        raise _unreadable(path, TOO_DEEP) from None
    except ValueError as error:  # of JSON
        raise _unreadable(path, f"a header that cannot be read ({error})") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file into CPU memory.

    Raises:
        DamagedCheckpointError: the file ends early or is not in this format.
    """
    entries = read_header(path).entries
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in entries.items()}
    with path.open("rb") as file:
        for name, entry in entries.items():
            read_into(tensors[name], file, entry.begin)
    return tensors


def read_tensor(path: Path, entry: Entry) -> Tensor:
    """Read one tensor of a safetensors file into CPU memory.

    Raises:
        DamagedCheckpointError: the file ends early.
    """
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    with path.open("rb") as file:
        read_into(tensor, file, entry.begin)
    return tensor


def read_into(tensor: Tensor, file: BinaryIO, position: int) -> None:
    """Fill a contiguous CPU tensor from the bytes at a position of a file.

    Raises:
        DamagedCheckpointError: the file ends before that.
    """
    file.seek(position)
    num_bytes = file.readinto(memory_of(tensor))  # type: ignore[attr-defined]
    if num_bytes != tensor.numel() * tensor.element_size():
        raise _unreadable(Path(file.name), f"an end {num_bytes} bytes after position {position}")


def _parse_header(text: bytes, data: tuple[int, int]) -> Header:
    """Check the header of a file whose tensors lie between two positions."""
    header = json.loads(text, object_pairs_hook=_each_once)
    if not isinstance(header, dict):
        raise OddFileError(f"{described(header)} in place of a header")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise OddFileError("metadata that is not text under names")
    entries = {name: _parse_entry(name, entry, data) for name, entry in header.items()}
    order = sorted(entries, key=lambda name: (entries[name].begin, entries[name].end))
    for name, follower in pairwise(order):
        if entries[follower].begin < entries[name].end:
            raise OddFileError(f"{described(follower)} and {described(name)} in the same bytes")
    if unused := data[1] - data[0] - sum(one.end - one.begin for one in entries.values()):
        raise OddFileError(f"{unused:,} bytes of no tensor")  # which the library does not take either
    return Header({name: entries[name] for name in order}, metadata)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, in which JSON itself would let the last of several values count."""
    names = dict(pairs)
    if len(names) < len(pairs):
        raise OddFileError(f"a header with {len(pairs) - len(names)} names given again")
    return names


def _parse_entry(name: str, entry: Any, data: tuple[int, int]) -> Entry:
    """Check one entry of a file whose tensors lie between two positions."""
    told: dict[str, Any] = entry if isinstance(entry, dict) else {}
    kind, shape, offsets = told.get("dtype"), told.get("shape", ()), told.get("data_offsets", ())
    dtype = _DTYPE_OF_NAME.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise OddFileError(f"{described(name)} of the dtype {described(kind)}")
    if not (_are_counts(shape, MOST_AXES) and _is_countable(shape) and _are_counts(offsets, 2) and len(offsets) == 2):
        raise OddFileError(f"{described(name)} without a shape and two offsets in whole numbers")
    begin, end = (data[0] + offset for offset in offsets)
    num_bytes = math.prod(shape) * dtype.itemsize
    if not begin <= end <= data[1] or end - begin != num_bytes:
        raise OddFileError(f"bytes {begin} to {end} of {data[1]} for shape {shape} of {dtype}, {described(name)}")
    return Entry(dtype, tuple(shape), begin, end)


def _are_counts(numbers: Any, most: int) -> bool:
    """Tell whether a value is a list of whole numbers."""
    return (
        isinstance(numbers, list)
        and len(numbers) <= most
        and all(type(number) is int and number >= 0 for number in numbers)
    )


def _is_countable(shape: list[int]) -> bool:
    """Tell whether torch can count a tensor's values and bytes."""
    return math.prod(max(number, 1) for number in shape) < 2**59  # of the widest values, fewer than 2**63 bytes


def _unreadable(path: Path, found: str, hint: str = "Use another checkpoint") -> DamagedCheckpointError:
    return DamagedCheckpointError("a safetensors file must be as it was written", f"{found} in {path}", hint)


def memory_of(tensor: Tensor) -> memoryview:
    """Bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
