"""Committing a checkpoint, pointing at it, and deleting old ones."""

import hashlib
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from mtp_lightning import __version__
from mtp_lightning.checkpoint.durable import replace_durably, sync_folder, write_durably
from mtp_lightning.checkpoint.layout import check_sizes, complete_checkpoints, name_of_step
from mtp_lightning.checkpoint.manifest import MANIFEST_NAME, FileRecord, Manifest, Moment, RunFacts
from mtp_lightning.errors import CheckpointError

_LEFTOVER = re.compile(r"step-\d{8,}\.(partial|removed)|(last|best)\.tmp")


def partial_path(folder: Path, step: int) -> Path:
    """Folder that a step's checkpoint is written into before it is complete."""
    return folder / f"{name_of_step(step)}.partial"


@contextmanager
def saving(folder: Path, moment: Moment, facts: RunFacts) -> Iterator[Path]:
    """Commit what the body writes into the folder that it is given, or leave no trace of it.

    Raises:
        CheckpointError: the system refused a write (a full disk, a quota); earlier checkpoints are untouched.
    """
    partial = partial_path(folder, moment.step)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _commit(partial, _describe(partial, moment, facts))
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _unwritable(folder, moment.step, error) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _describe(partial: Path, moment: Moment, facts: RunFacts) -> Manifest:
    return Manifest(
        package_version=__version__,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        step=moment.step,
        tokens=moment.tokens,
        recipe_hash=facts.recipe_hash,
        num_offsets=facts.num_offsets,
        layers=dict(facts.layers),
        world_size=facts.world_size,
        metrics={name: value for name, value in moment.metrics.items() if math.isfinite(value)},
        files={path.name: _record(path) for path in sorted(partial.iterdir())},
    )


def _record(path: Path) -> FileRecord:
    """Force a file to disk and describe it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(size_bytes=os.fstat(file.fileno()).st_size, sha256=digest)


def _commit(partial: Path, manifest: Manifest) -> None:
    write_durably(partial / MANIFEST_NAME, manifest.model_dump_json(indent=2).encode())
    sync_folder(partial)
    final = partial.with_suffix("")
    former = _set_aside(final) if final.exists() else None  # the same step again, after going back
    partial.rename(final)
    sync_folder(final.parent)
    if former:
        shutil.rmtree(former, ignore_errors=True)


def _unwritable(folder: Path, step: int, error: OSError) -> CheckpointError:
    complete = complete_checkpoints(folder)
    survivor = f"{complete[-1].path.name} is complete" if complete else "there is no earlier checkpoint"
    return CheckpointError(
        f"the checkpoint of step {step} must be written to {folder}",
        f"{error.strerror or error} ({_free_mib(folder):.0f} MiB free there)",
        f"Make room or repair access, then run the same command again: {survivor}",
    )


def _free_mib(folder: Path) -> float:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(existing).free / 2**20


def retain(folder: Path, *, keep: int, best: str | None) -> None:
    """Delete old checkpoints; the newest two, the newest `keep` and the one named `best` are not touched."""
    complete = complete_checkpoints(folder)
    for checkpoint in complete[: -max(keep, 2)]:
        if checkpoint.path.name != best:
            shutil.rmtree(_set_aside(checkpoint.path), ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what an interrupted save or removal left; call it when no other process writes here."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint before it is deleted, so that a half-deleted one never bears its name."""
    aside = path.with_name(path.name + ".removed")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def write_pointer(folder: Path, kind: str, name: str) -> None:
    """Let the file `last` or `best` name a checkpoint.

    Raises:
        CheckpointError: the system refused the write; checkpoints are untouched.
    """
    try:
        replace_durably(folder / kind, f"{name}\n".encode())
    except OSError as error:
        raise CheckpointError(
            f"the pointer {kind} in {folder} must be writable",
            f"{error.strerror or error} ({_free_mib(folder):.0f} MiB free there)",
            f"Make room or repair access, then run the same command again: {name} is complete",
        ) from error


def read_pointer(folder: Path, kind: str) -> Path | None:
    """Follow `last` or `best`; None where it is missing or names no complete checkpoint."""
    try:
        path = folder / (folder / kind).read_text().strip()
        check_sizes(path)
    except (OSError, CheckpointError):
        return None
    return path
