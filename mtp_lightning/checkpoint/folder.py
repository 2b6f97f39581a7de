"""One checkpoint's content as files: weights, optimizer, other tensors, and a JSON document for the rest.

`model.safetensors` holds the state dict under its own names, so that any tool can read the weights.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mtp_lightning.checkpoint.manifest import DamagedCheckpointError
from mtp_lightning.checkpoint.tensors import read_tensors, write_tensors
from mtp_lightning.checkpoint.tree import decode, encode

STATE_NAME = "state.json"
_OWN_FILES = {"state_dict": "model.safetensors", "optimizer_states": "optimizer.safetensors"}
_OTHER_TENSORS = "other.safetensors"


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a training state into a folder and force it to disk; holds no second copy of the tensors.

    Raises:
        CheckpointError: a value has no exact form (nothing has been written then).
        OSError: the disk is full, or the folder cannot be written.
    """
    documents: dict[str, Any] = {}
    files: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Any] = {key: value for key, value in state.items() if key not in _OWN_FILES}
    for key, name in _OWN_FILES.items():
        if key in state:
            documents[key], files[name] = encode(state[key])
    documents["others"], files[_OTHER_TENSORS] = encode(others)
    documents["order"] = list(state)
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        with (folder / name).open("wb") as file:
            write_tensors(file, tensors)
            file.flush()
            os.fsync(file.fileno())
    with (folder / STATE_NAME).open("wb") as file:
        file.write(json.dumps(documents, allow_nan=False).encode())
        file.flush()
        os.fsync(file.fileno())


def read_state(folder: Path) -> dict[str, Any]:
    """Read back what `write_state` wrote; every tensor lies in CPU memory.

    Raises:
        DamagedCheckpointError: a file is missing or is not what was written.
    """
    try:
        documents = json.loads((folder / STATE_NAME).read_bytes())
        state = decode(documents["others"], read_tensors(folder / _OTHER_TENSORS))
        for key, name in _OWN_FILES.items():
            if key in documents:
                state[key] = decode(documents[key], read_tensors(folder / name))
        return {key: state[key] for key in documents["order"]}
    except FileNotFoundError as error:
        found = f"no {Path(error.filename).name} in {folder}"
    except (ValueError, KeyError, TypeError) as error:
        found = f"{error!r} in {folder / STATE_NAME}"
    raise DamagedCheckpointError("a checkpoint must hold all it was written with", found, "Use another checkpoint")
