"""The plug between a Lightning trainer and checkpoint folders."""

import shutil
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from mtp_lightning.checkpoint.folder import read_state, write_state
from mtp_lightning.checkpoint.layout import verify
from mtp_lightning.errors import CheckpointError


class SafeCheckpointIO(CheckpointIO):
    """Save and load Lightning's checkpoint dict as a folder without pickle.

    A save only fills the folder: the caller commits it (`commit.saving`). A load takes committed folders
    only, and checks every file against its digest first.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint folder; not yet complete until it is committed."""
        if storage_options is not None:
            raise TypeError(f"{type(self).__name__} takes no storage_options")
        write_state(Path(path), checkpoint)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a complete checkpoint into CPU memory; `weights_only` changes nothing: no code is ever loaded.

        Raises:
            CheckpointError: the checkpoint is missing, incomplete or damaged.
        """
        if map_location is not None and torch.device(map_location) != torch.device("cpu"):
            raise CheckpointError(
                "a checkpoint is read into CPU memory",
                f"map_location={map_location!r}",
                "Move the tensors after loading",
            )
        verify(Path(path))
        return read_state(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint folder."""
        shutil.rmtree(path)
