"""Committing a checkpoint, pointing at it, and deleting old ones."""

import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

from mtp_lightning import __version__
from mtp_lightning.checkpoint.format.folder import check_sizes, complete_checkpoints, name_of_step
from mtp_lightning.checkpoint.format.manifest import MANIFEST_NAME, RECIPE_NAME, Manifest, RunMetadata, SavePoint
from mtp_lightning.errors import CheckpointError, refusal_of
from mtp_lightning.files.atomic_folder import make_empty, publish, remove_folder, removed_on_error
from mtp_lightning.files.durable import FileRecord, describe_file, replace_durably, write_durably
from mtp_lightning.ranks import Ranks

_LEFTOVER = re.compile(r"step-\d{8,}\.(partial|removed)|(last|best)\.tmp")


def partial_path(folder: Path, step: int) -> Path:
    """Folder that a step's checkpoint is written into before it is complete."""
    return folder / f"{name_of_step(step)}.partial"


def save_collectively(
    ranks: Ranks,
    folder: Path,
    point: SavePoint,
    metadata: RunMetadata,
    write: Callable[[Path], Mapping[str, FileRecord]],
) -> Path:
    """Commit what every rank writes as one checkpoint, or leave no trace of it; all ranks call it.

    When it returns or raises, it has done so on every rank: either the checkpoint is complete, or the partial
    folder is gone.

    Args:
        ranks: who takes part; all must see the same folder.
        folder: where checkpoints lie.
        point: where in the run this is; the first rank's goes into the manifest.
        metadata: what is the same over the run; the first rank's goes into the manifest.
        write: fills the partial folder and returns the records of the files it wrote, which must be on disk. Files
            that no record names are forced to disk and hashed by the first rank.

    Returns:
        The committed folder.

    Raises:
        CheckpointError: the system refused a write on some rank (a full disk, a quota), or the ranks do not share the
            folder; earlier checkpoints are untouched.
    """
    partial = partial_path(folder, point.step)
    with ranks.raise_on_all_ranks(), removed_on_error(partial) if ranks.is_first else nullcontext():
        with ranks.raise_on_all_ranks(), _explaining(folder, point.step):
            if ranks.is_first:
                make_empty(partial)
        records: Mapping[str, FileRecord] = {}
        with ranks.raise_on_all_ranks(), _explaining(folder, point.step):
            records = write(partial)
        records_of_ranks = ranks.gather(dict(records))
        if ranks.is_first:
            with _explaining(folder, point.step):
                _check_shared(partial, records_of_ranks)
                _commit(
                    partial, point, metadata, {name: record for own in records_of_ranks for name, record in own.items()}
                )
    return partial.with_suffix("")


@contextmanager
def _explaining(folder: Path, step: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unwritable(folder, step, error) from error


def _check_shared(partial: Path, records_of_ranks: list[dict[str, FileRecord]]) -> None:
    """Check that the first rank sees what every rank says that it wrote."""
    owner: dict[str, int] = {}
    for rank, records in enumerate(records_of_ranks):
        for name, record in records.items():
            file = partial / name
            size_bytes = file.stat().st_size if file.is_file() else None
            if name in owner or size_bytes != record.size_bytes:
                what = (
                    f"written by rank {owner[name]} too" if name in owner else f"seen by rank 0 with {size_bytes} bytes"
                )
                raise CheckpointError(
                    "every rank must write files of its own into one folder that all ranks share",
                    f"{name} written by rank {rank} with {record.size_bytes} bytes, {what}, in {partial}",
                    "Put run.dir on a file system that all nodes share",
                )
            owner[name] = rank


def _describe(partial: Path, point: SavePoint, metadata: RunMetadata, records: Mapping[str, FileRecord]) -> Manifest:
    return Manifest(
        package_version=__version__,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        step=point.step,
        tokens=point.tokens,
        recipe_hash=metadata.recipe_hash,
        num_offsets=metadata.num_offsets,
        layers=dict(metadata.layers),
        world_size=metadata.world_size,
        strategy=metadata.strategy,
        metrics={name: value for name, value in point.metrics.items() if math.isfinite(value)},
        files={
            path.name: records.get(path.name) or describe_file(path, is_synced=False)
            for path in sorted(partial.iterdir())
        },
    )


def _commit(partial: Path, point: SavePoint, metadata: RunMetadata, records: Mapping[str, FileRecord]) -> None:
    if metadata.recipe_text:
        records = {**records, RECIPE_NAME: write_durably(partial / RECIPE_NAME, metadata.recipe_text.encode())}
    manifest = _describe(partial, point, metadata, records)
    write_durably(partial / MANIFEST_NAME, manifest.model_dump_json(indent=2).encode())
    publish(partial, partial.with_suffix(""), replace=True)  # the same step may be there, after going back


def _unwritable(folder: Path, step: int, error: OSError) -> CheckpointError:
    complete = complete_checkpoints(folder)
    survivor = "there is no earlier checkpoint"
    if complete:
        size_bytes = sum(record.size_bytes for record in complete[-1].manifest.files.values())
        survivor = f"{complete[-1].path.name} is complete, and takes {size_bytes / 2**20:,.1f} MiB"
    return CheckpointError(
        f"the checkpoint of step {step} must be written to {folder}",
        refusal_of(error, folder),
        f"Make room or repair access, then run the same command again: {survivor}",
    )


@contextmanager
def keeping_up(folder: Path, name: str) -> Iterator[None]:
    """Tell of a refusal after a checkpoint was committed that it is complete.

    Raises:
        CheckpointError: the system refused a write; checkpoints are untouched.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"what is kept beside the checkpoints in {folder} must be writable",
            refusal_of(error, folder),
            f"Make room or repair access, then run the same command again: {name} is complete",
        ) from error


def retain(
    folder: Path, *, keep: int, best: str | None, is_permanent: Callable[[int], bool] = lambda step: False
) -> None:
    """Delete old checkpoints, but not the newest two, the newest `keep`, the one named `best` and permanent ones."""
    complete = complete_checkpoints(folder)
    for checkpoint in complete[: -max(keep, 2)]:
        if checkpoint.path.name != best and not is_permanent(checkpoint.step):
            remove_folder(checkpoint.path)


def remove_leftovers(folder: Path) -> None:
    """Delete what an interrupted save or removal left; call it when no other process writes here."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_pointer(folder: Path, kind: str, name: str) -> None:
    """Let the file `last` or `best` name a checkpoint.

    Raises:
        CheckpointError: the system refused the write; checkpoints are untouched.
    """
    with keeping_up(folder, name):
        replace_durably(folder / kind, f"{name}\n".encode())


def read_pointer(folder: Path, kind: str) -> Path | None:
    """Follow `last` or `best`; None where it is missing or names no complete checkpoint."""
    try:
        if not (folder / kind).is_file():  # a FIFO would be waited for
            return None
        path = folder / (folder / kind).read_text().strip()
        check_sizes(path)
    except (OSError, CheckpointError):
        return None
    return path
