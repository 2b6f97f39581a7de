"""One checkpoint's state other than weights and moments: a JSON document, and the tensors that it names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtp_lightning.checkpoint.format.manifest import DamagedCheckpointError
from mtp_lightning.checkpoint.format.state_tree import decode, encode
from mtp_lightning.checkpoint.format.tensors import read_tensors, write_tensors
from mtp_lightning.files.durable import FileRecord, durable_file, write_durably

STATE_NAME = "state.json"
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
        document = json.loads((folder / STATE_NAME).read_bytes())
        state: dict[str, Any] = decode(document, read_tensors(folder / _TENSORS_NAME))
        return state
    except FileNotFoundError as error:
        found = f"no {Path(error.filename).name} in {folder}"
    except (ValueError, KeyError, TypeError) as error:
        found = f"{error!r} in {folder / STATE_NAME}"
    raise DamagedCheckpointError("a checkpoint must hold all it was written with", found, "Use another checkpoint")
