"""Finding and verifying a run's checkpoints on disk.

`step-00000200.partial` becomes `step-00000200` by one rename after every file in it, the manifest last, has
reached the disk (`commit`). So a folder with the final name is complete, whatever moment the machine died at.
The files `last` and `best` hold the name of a checkpoint for people and scripts; the program itself scans.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mtp_lightning.checkpoint.format.manifest import MANIFEST_NAME, DamagedCheckpointError, Manifest, read_manifest
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.durable import FileRecord

BLOCK_BYTES = 2**20
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Optimizer steps done when it was taken."""
        return self.manifest.step


def name_of_step(step: int) -> str:
    """Name of the checkpoint folder of a step."""
    return f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """Find the checkpoints whose manifest is in place and whose files have the right sizes, oldest first."""
    found = []
    for path in named_checkpoints(folder):
        try:
            found.append(Checkpoint(path, check_sizes(path)))
        except CheckpointError:
            continue
    return found


def newest_complete(folder: Path) -> Checkpoint | None:
    """Find the newest checkpoint whose every byte is as committed.

    A damaged one is renamed `.bad`, named in a printed line, and the one before it is tried. Call it on one
    rank only.

    Raises:
        CheckpointError: one cannot be read for another reason than damage (permissions, a later format).
    """
    for path in reversed(named_checkpoints(folder)):
        try:
            return Checkpoint(path, verify(path))
        except DamagedCheckpointError as error:
            aside = _free_name(path, ".bad")
            path.rename(aside)
            print(
                f"Damaged checkpoint, now called {aside.name}: {error.found}. Trying the one before.",
                flush=True,
            )
    return None


def verify(path: Path) -> Manifest:
    """Compare every file of a checkpoint with its manifest, by size and digest.

    Raises:
        DamagedCheckpointError: names the file and what differs.
        CheckpointError: a file cannot be read.
    """
    manifest = check_sizes(path)
    check_digests(path, manifest.files)
    return manifest


def check_digests(path: Path, files: Mapping[str, FileRecord], advance: Callable[[int], None] | None = None) -> None:
    """Compare the content of files of a folder with their records; `advance` is told of bytes read.

    Raises:
        DamagedCheckpointError: names the file and what differs.
        CheckpointError: a file cannot be read.
    """
    for name, record in files.items():
        try:
            digest = _digest_of(path / name, advance)
        except OSError as error:
            raise CheckpointError(
                "every file of a checkpoint must be readable",
                f"{error.strerror} for {path / name}",
                "Repair access to it",
            ) from None
        if digest != record.sha256:
            raise _difference(path / name, f"sha256 {digest[:12]}… instead of {record.sha256[:12]}…")


def _digest_of(file: Path, advance: Callable[[int], None] | None) -> str:
    digest = hashlib.sha256()
    memory = memoryview(bytearray(BLOCK_BYTES))
    with file.open("rb", buffering=0) as content:
        while num_bytes := content.readinto(memory):
            digest.update(memory[:num_bytes])
            if advance is not None:
                advance(num_bytes)
    return digest.hexdigest()


def check_sizes(path: Path) -> Manifest:
    """Compare the names and sizes of a checkpoint's files with its manifest.

    Raises:
        DamagedCheckpointError: names the file and what differs.
    """
    manifest = read_manifest(path)
    if path.name != name_of_step(manifest.step):
        raise _difference(path / MANIFEST_NAME, f"step {manifest.step} in a folder called {path.name}")
    check_files(path, manifest.files)
    return manifest


def check_files(path: Path, files: Mapping[str, FileRecord]) -> None:
    """Compare the names and sizes of files of a folder with their records.

    Raises:
        DamagedCheckpointError: names the file and what differs.
    """
    for name, record in files.items():
        file = path / name
        if not file.is_file():
            raise _difference(file, "no such file")
        if (size_bytes := file.stat().st_size) != record.size_bytes:
            raise _difference(file, f"{size_bytes} bytes instead of {record.size_bytes}")


def _difference(file: Path, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        "every file of a checkpoint must be as its manifest says", f"{what}: {file}", "Use another checkpoint"
    )


def named_checkpoints(folder: Path) -> list[Path]:
    """List folders with a checkpoint's final name, oldest first."""
    steps = {
        path: int(match[1])
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    return sorted(steps, key=steps.__getitem__)


def _free_name(path: Path, ending: str) -> Path:
    aside = path.with_name(path.name + ending)
    number = 2
    while aside.exists():
        aside = path.with_name(f"{path.name}{ending}.{number}")
        number += 1
    return aside
