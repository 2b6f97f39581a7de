"""Safetensors files, written and read one tensor at a time.

The library's writer brings all tensors to the CPU (before 0.8: into Python bytes) before it writes the first,
wants them contiguous, and reports a full disk as an error of its own. This one holds one tensor at a time and
lets OSError through. Reading is into memory of its own, not a map: a file can go while its tensors live.
"""

import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mtp_lightning.checkpoint.manifest import DamagedCheckpointError

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
_DTYPE_OF_NAME = {name: dtype for dtype, name in NAME_OF_DTYPE.items()}


def write_tensors(file: BinaryIO, tensors: dict[str, Tensor]) -> None:
    """Write tensors of any device and stride in safetensors format."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # widest first keeps all aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in order:
        tensor = tensors[name]
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAME_OF_DTYPE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        file.write(_memory(tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous()))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file into CPU memory.

    Raises:
        DamagedCheckpointError: the file ends early or is not in this format.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        try:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(header_bytes, size_bytes)))
            header.pop("__metadata__", None)
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            return {name: _read_tensor(file, entry, (8 + header_bytes, size_bytes)) for name, entry in entries}
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise DamagedCheckpointError(
                "a safetensors file must be as it was written",
                f"{error!r} in {path}",
                "Use another checkpoint",
            ) from None


def _read_tensor(file: BinaryIO, entry: dict[str, Any], data: tuple[int, int]) -> Tensor:
    """Read one tensor of a file whose tensors lie between two positions."""
    begin, end = (data[0] + offset for offset in entry["data_offsets"])
    dtype, shape = _DTYPE_OF_NAME[entry["dtype"]], entry["shape"]
    if not data[0] <= begin <= end <= data[1] or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"bytes {begin} to {end} of {data[1]} for shape {shape} of {dtype}")
    tensor = torch.empty(shape, dtype=dtype)
    file.seek(begin)
    file.readinto(_memory(tensor))  # type: ignore[attr-defined]
    return tensor


def _memory(tensor: Tensor) -> memoryview:
    """Bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
