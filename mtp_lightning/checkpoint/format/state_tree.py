"""A checkpoint's state other than weights and moments: nested Python values as a JSON document plus named tensors.

They come back exactly, and without pickle.

Accepted: None, bool, int, float (nan and infinities too), str, bytes, list, tuple, dict and OrderedDict with
str or int keys, dense tensors, numpy arrays and scalars of bool, integer, float or complex type. Types are
matched exactly: a subclass would come back as something else, so it is refused. What JSON lacks is written as
an object whose first key begins with `$`. A tensor that occurs twice is stored once and comes back as one.
"""

import base64
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtp_lightning.checkpoint.format.manifest import DamagedCheckpointError
from mtp_lightning.checkpoint.format.tensors import NAME_OF_DTYPE, read_tensors, write_tensors
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.durable import FileRecord, durable_file, write_durably
from mtp_lightning.files.untrusted import described, read_json, reason_of

Json = Any  # what json.dumps writes
STATE_NAME = "state.json"
MOST_STATE_BYTES = 2**30  # generators of every rank
_TENSORS_NAME = "other.safetensors"


def write_state(folder: Path, state: Mapping[str, Any]) -> dict[str, FileRecord]:
    """Write a training state into a folder and force it to disk; holds no second copy of the tensors.

    Raises:
        CheckpointError: a value has no exact form (nothing has been written then).
        OSError: the disk is full, or the folder cannot be written.
    """
    document, tensors = encode(dict(state))
    folder.mkdir(parents=True, exist_ok=True)
    with durable_file(folder / _TENSORS_NAME) as file:
        tensors_record = write_tensors(file, tensors)
    content = json.dumps(document, allow_nan=False).encode()
    return {_TENSORS_NAME: tensors_record, STATE_NAME: write_durably(folder / STATE_NAME, content)}


def read_state(folder: Path) -> dict[str, Any]:
    """Read back what `write_state` wrote; every tensor lies in CPU memory.

    Raises:
        DamagedCheckpointError: a file is missing or is not what was written.
    """
    try:
        document = read_json(folder / STATE_NAME, MOST_STATE_BYTES)
        state = decode(document, read_tensors(folder / _TENSORS_NAME))
        if isinstance(state, dict):
            return state
        found = f"{described(state)} in {folder / STATE_NAME}"
    except FileNotFoundError as error:
        found = f"no {Path(error.filename).name} in {folder}"
    except OSError as error:
        found = f"{reason_of(error)}, in {folder}"
    except (ValueError, KeyError, TypeError) as error:
        found = f"{error!r} in {folder / STATE_NAME}"
    raise DamagedCheckpointError("a checkpoint must hold all it was written with", found, "Use another checkpoint")


def encode(value: object, *, root: str = "") -> tuple[Json, dict[str, Tensor]]:
    """Split a value into a JSON document and the tensors that it names.

    Args:
        value: the nested structure; its tensors are not copied.
        root: first part of the tensors' names.

    Raises:
        CheckpointError: something in the value has no exact form; names its path and type.
    """
    encoder = _Encoder()
    return encoder.encode(value, root), encoder.tensors


def decode(document: Json, tensors: dict[str, Tensor]) -> Any:
    """Rebuild what `encode` split; arrays share memory with the given tensors."""
    if isinstance(document, list):
        return [decode(item, tensors) for item in document]
    if not isinstance(document, dict):
        return document
    tag = next(iter(document), "")
    if not tag.startswith("$"):
        return {key: decode(item, tensors) for key, item in document.items()}
    return _DECODERS[tag](document, tensors)


class _Encoder:
    """State of one encoding: the tensors met so far."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._name_of: dict[tuple[object, ...], str] = {}

    def encode(self, value: object, path: str) -> Json:
        if isinstance(value, Tensor):
            return {"$tensor": self._name(value, path)}
        if isinstance(value, np.generic | np.ndarray):
            return self._encode_numpy(value, path)
        encoder = _ENCODERS.get(type(value))
        if encoder is None:
            raise _refusal(path, type(value).__qualname__)
        return encoder(self, value, path)

    def encode_float(self, value: float, path: str) -> Json:
        return value if math.isfinite(value) else {"$float": repr(value)}

    def encode_bytes(self, value: bytes, path: str) -> Json:
        return {"$bytes": base64.b64encode(value).decode()}

    def encode_list(self, value: list[object], path: str) -> Json:
        return [self.encode(item, _join(path, index)) for index, item in enumerate(value)]

    def encode_tuple(self, value: tuple[object, ...], path: str) -> Json:
        return {"$tuple": self.encode_list(list(value), path)}

    def encode_dict(self, value: dict[object, object], path: str) -> Json:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return {str(key): self.encode(item, _join(path, key)) for key, item in value.items()}
        return {"$dict": self._encode_pairs(value, path)}

    def encode_ordered(self, value: "OrderedDict[object, object]", path: str) -> Json:
        document = {"$ordered": self._encode_pairs(value, path)}
        metadata = getattr(value, "_metadata", None)  # versions of modules, which torch hangs on a state_dict
        if metadata is not None:
            document["metadata"] = self.encode(metadata, _join(path, "_metadata"))
        return document

    def _encode_pairs(self, value: dict[object, object], path: str) -> Json:
        for key in value:
            if type(key) not in (str, int):
                raise _refusal(path, f"{type(key).__qualname__} as the key {key!r}")
        return [[key, self.encode(item, _join(path, key))] for key, item in value.items()]

    def _encode_numpy(self, value: "np.generic | np.ndarray[Any, Any]", path: str) -> Json:
        if value.dtype.kind not in "biufc" or not value.dtype.isnative:
            raise _refusal(path, f"{type(value).__qualname__} of {value.dtype}")
        if isinstance(value, np.generic):
            return {"$scalar": [value.dtype.str, value.tobytes().hex()]}
        if type(value) is not np.ndarray:
            raise _refusal(path, type(value).__qualname__)
        is_torch_like = value.flags.writeable and min(value.strides, default=0) >= 0
        try:
            tensor = torch.from_numpy(value if is_torch_like else value.copy())
        except TypeError:  # a type that torch lacks
            raise _refusal(path, f"ndarray of {value.dtype}") from None
        return {"$array": self._name(tensor, path)}

    def _name(self, tensor: Tensor, path: str) -> str:
        """Register a tensor under its path, or find the name that the same memory already has."""
        _check_tensor(tensor, path)
        identity = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if identity in self._name_of and tensor.numel():
            return self._name_of[identity]
        name = path or "value"
        while name in self.tensors or name == "__metadata__":  # {"a/b": …, "a": {"b": …}}; safetensors' own key
            name += "'"
        self.tensors[name] = tensor.detach()
        self._name_of[identity] = name
        return name


_ENCODERS: dict[type, Callable[[_Encoder, Any, str], Json]] = {
    **dict.fromkeys((type(None), bool, int, str), lambda encoder, value, path: value),
    float: _Encoder.encode_float,
    bytes: _Encoder.encode_bytes,
    list: _Encoder.encode_list,
    tuple: _Encoder.encode_tuple,
    dict: _Encoder.encode_dict,
    OrderedDict: _Encoder.encode_ordered,
}


def _decode_ordered(document: Json, tensors: dict[str, Tensor]) -> "OrderedDict[Any, Any]":
    value = OrderedDict((key, decode(item, tensors)) for key, item in document["$ordered"])
    if "metadata" in document:
        value._metadata = decode(document["metadata"], tensors)  # type: ignore[attr-defined]
    return value


def _decode_scalar(document: Json, tensors: dict[str, Tensor]) -> "np.generic":
    dtype, content = document["$scalar"]
    scalar: np.generic = np.frombuffer(bytes.fromhex(content), dtype)[0]
    return scalar


_DECODERS: dict[str, Callable[[Json, dict[str, Tensor]], Any]] = {
    "$tensor": lambda document, tensors: tensors[document["$tensor"]],
    "$array": lambda document, tensors: tensors[document["$array"]].numpy(),
    "$scalar": _decode_scalar,
    "$float": lambda document, tensors: float(document["$float"]),
    "$bytes": lambda document, tensors: base64.b64decode(document["$bytes"]),
    "$tuple": lambda document, tensors: tuple(decode(document["$tuple"], tensors)),
    "$dict": lambda document, tensors: {key: decode(item, tensors) for key, item in document["$dict"]},
    "$ordered": _decode_ordered,
}


def _check_tensor(tensor: Tensor, path: str) -> None:
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise _refusal(path, type(tensor).__qualname__)
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in NAME_OF_DTYPE:
        raise _refusal(path, f"{tensor.layout} tensor of {tensor.dtype} on {tensor.device}")


def _join(path: str, key: object) -> str:
    return f"{path}/{key}" if path else str(key)


def _refusal(path: str, found: str) -> CheckpointError:
    return CheckpointError(
        "a checkpoint may hold tensors, arrays, numbers, text, bytes, lists, tuples and dicts of these",
        f"{found} at {path or 'the top'}",
        "Store it in one of these forms",
    )
