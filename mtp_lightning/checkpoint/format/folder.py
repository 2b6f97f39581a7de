"""Checkpoints and exported folders on disk: found and verified once, then passed on as values.

`step-00000200.partial` becomes `step-00000200` by one rename after every file in it, the manifest last, has
reached the disk (`commit`). So a folder with the final name is complete, whatever moment the machine died at.
The files `last` and `best` hold the name of a checkpoint for people and scripts; the program itself scans.
"""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, final

from mtp_lightning.checkpoint.format.manifest import (
    CONFIG_NAME,
    MANIFEST_NAME,
    RECIPE_NAME,
    DamagedCheckpointError,
    ExportConfig,
    Manifest,
    read_description,
    read_manifest,
)
from mtp_lightning.checkpoint.format.read_shards import ShardReader
from mtp_lightning.checkpoint.format.state_tree import STATE_NAME, read_state
from mtp_lightning.console.progress import say, watched
from mtp_lightning.errors import CheckpointError, removed_checkpoint
from mtp_lightning.files.durable import FileRecord
from mtp_lightning.recipe import Recipe, load_recipe
from mtp_lightning.recipe.schema.phases import FOLDER as PHASES

BLOCK_BYTES = 2**20
MOST_TRIES = 20  # to read the newest checkpoint of a run that removes it meanwhile
_NAME = re.compile(r"step-(\d{8,})")


_READS_AVERAGES = ContextVar("reads averages", default=False)


@contextlib.contextmanager
def reading_averages(*, averaged: bool = True) -> Iterator[None]:
    """Let checkpoints that are opened in the body show the moving averages of their weights in the weights' place."""
    token = _READS_AVERAGES.set(averaged)
    try:
        yield
    finally:
        _READS_AVERAGES.reset(token)


@final
@dataclass(frozen=True)
class CheckpointFolder:
    """A checkpoint of a run, or an exported folder, whose files are there in their sizes.

    What is read of it is read once: the description when it was found, recipe and headers when they are first needed.
    """

    path: Path
    manifest: Manifest | ExportConfig
    is_averaged: bool = field(default_factory=_READS_AVERAGES.get)  # shows averages of the weights as the weights

    @property
    def is_export(self) -> bool:
        """Whether `mtp export`, `import` or `extend` wrote it."""
        return isinstance(self.manifest, ExportConfig)

    @property
    def step(self) -> int:
        """Optimizer steps done when it was taken."""
        return self.manifest.step

    @property
    def metrics(self) -> Mapping[str, float]:
        """Validation at its very step, where there was one."""
        return {} if isinstance(self.manifest, ExportConfig) else self.manifest.metrics

    @property
    def sha256(self) -> str:
        """Digest of the file that describes it, and with it of all others."""
        name = CONFIG_NAME if self.is_export else MANIFEST_NAME
        return hashlib.sha256((self.path / name).read_bytes()).hexdigest()

    @property
    def model_files(self) -> dict[str, FileRecord]:
        """Files that the model consists of, its recipe among them."""
        files, parts = self.manifest.files.items(), ("model", *(["optimizer"] if self.is_averaged else []))
        return {name: record for name, record in files if name.startswith(parts) or name == RECIPE_NAME}

    @property
    def model_bytes(self) -> int:
        """Size of these files."""
        return sum(record.size_bytes for record in self.model_files.values())

    @property
    def model_name(self) -> str:
        """Name the model by its folder and a digest over all files that it consists of; reads none of them."""
        listing = "\n".join(f"{name} {record.sha256}" for name, record in sorted(self.model_files.items()))
        return f"{self.path.name} of sha256 {hashlib.sha256(listing.encode()).hexdigest()[:16]}"

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe that it was trained by."""
        return load_recipe(self.path / RECIPE_NAME).recipe

    @cached_property
    def reader(self) -> ShardReader:
        """Weights and moments; opening it reads the headers of all shards."""
        return ShardReader(self.path, averaged=self.is_averaged)

    @property
    def has_state(self) -> bool:
        """Whether training can go on from it exactly."""
        return (self.path / STATE_NAME).is_file()

    def verify(self) -> None:
        """Read the files of the model and compare their digests; `open_checkpoint` has done so unless told not to.

        Raises:
            DamagedCheckpointError: names the file and what differs, and the good checkpoint before it.
        """
        with suggest_other_checkpoint(self.path), _told_if_removed(self.path):
            _check_model(self, verify=True)

    def state(self) -> dict[str, Any]:
        """Read all state of the training but weights and moments."""
        return read_state(self.path)


def open_checkpoint(path: str | Path, *, verify: bool = True) -> CheckpointFolder:
    """Find a trained model and check it, before anything is built from it.

    The shards' headers are read and must hold every value of every parameter once; the recipe is compared with its
    digest. Checkpoints that are passed over because a file is missing or has a wrong size are named in a printed line.

    Args:
        path: run folder (its newest complete checkpoint is taken; of a run in phases that of the last phase that has
            any), checkpoint folder, or exported folder.
        verify: read the weights, too, and compare their digests.

    Raises:
        CheckpointError: there is nothing to open, or it is damaged (names the file, and the good checkpoint before it).
    """
    path = _last_phase(Path(path).resolve())
    tries_left = MOST_TRIES
    while True:
        with suggest_other_checkpoint(path), _told_if_removed(path):
            manifest = read_description(path)
            found = _newest_of_run(path) if manifest is None else _with_all_files(CheckpointFolder(path, manifest))
        try:
            with suggest_other_checkpoint(found.path), _told_if_removed(found.path):
                return _check_model(found, verify=verify)
        except CheckpointError:
            tries_left -= 1
            if found.path == path or found.path.exists() or not tries_left:
                raise
            say(f"{found.path.name} was removed by its run while it was read: taking the newest anew", stderr=True)


@contextlib.contextmanager
def _told_if_removed(path: Path) -> Iterator[None]:
    """Let what goes wrong with a checkpoint that its run has removed be told as that."""
    try:
        yield
    except (CheckpointError, OSError):
        if removed := removed_checkpoint(path):
            raise removed from None
        raise


def _last_phase(path: Path) -> Path:
    """Return of a run in phases the last that has a checkpoint, else the path itself."""
    begun = [saved.parents[1] for saved in path.glob(f"{PHASES}/*/checkpoints/step-*")]
    return max(begun, key=lambda phase: int(phase.name.partition("-")[0]), default=path)


def _newest_of_run(path: Path) -> CheckpointFolder:
    folder = path / "checkpoints"
    if not folder.is_dir():
        raise CheckpointError(
            "the path must be a run folder, a checkpoint folder or an exported folder",
            f"neither checkpoints/ nor {MANIFEST_NAME} nor {CONFIG_NAME} in {path}"
            if path.is_dir()
            else f"no folder {path}",
            "Give the run.dir of a run, one of its checkpoints/step-*, or what `mtp export` wrote",
        )
    reasons = []
    for checkpoint in reversed(named_checkpoints(folder)):
        try:
            return check_sizes(checkpoint)
        except CheckpointError as error:
            say(f"Passing over {checkpoint.name}: {error.found}", stderr=True)
            reasons.append(error.found)
    raise CheckpointError(
        "a run folder must have a complete checkpoint",
        "; ".join(reasons) or f"none in {folder}",
        "Let the run go on until its first checkpoint (checkpoint.every_steps, checkpoint.every_minutes)",
    )


def _check_model(folder: CheckpointFolder, *, verify: bool) -> CheckpointFolder:
    """Check the files of the model; return the folder."""
    files = folder.model_files
    if RECIPE_NAME not in files:
        raise DamagedCheckpointError(
            "a folder to load a model from must hold the recipe",
            f"no {RECIPE_NAME} in {folder.path}",
            "Use another one",
        )
    if not verify:
        files = {RECIPE_NAME: files[RECIPE_NAME]}
    with watched(f"Checking {folder.path.name}", total_bytes=folder.model_bytes, show=verify) as advance:
        _check_digests(folder.path, files, advance)
    _ = folder.reader  # refuses shards that contradict each other
    return folder


@contextlib.contextmanager
def suggest_other_checkpoint(path: Path) -> Iterator[None]:
    """Let an error about a damaged checkpoint name the good one before it, if there is one."""
    try:
        yield
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(error.expected, error.found, _suggestion(path) or error.hint) from None


def _suggestion(damaged: Path) -> str | None:
    """Name the newest checkpoint before this one whose model is as it was written."""
    if damaged not in (beside := named_checkpoints(damaged.parent)):
        return None
    for path in reversed(beside[: beside.index(damaged)]):
        with contextlib.suppress(CheckpointError):
            return f"The checkpoint before it is good: {_check_model(check_sizes(path), verify=True).path}"
    return "No good checkpoint lies before it in the run"


def name_of_step(step: int) -> str:
    """Name of the checkpoint folder of a step."""
    return f"step-{step:08d}"


def named_checkpoints(folder: Path) -> list[Path]:
    """List folders with a checkpoint's final name, oldest first."""
    steps = {
        path: int(match[1])
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    return sorted(steps, key=steps.__getitem__)


def complete_checkpoints(folder: Path) -> list[CheckpointFolder]:
    """Find the checkpoints whose manifest is in place and whose files have the right sizes, oldest first."""
    found = []
    for path in named_checkpoints(folder):
        with contextlib.suppress(CheckpointError):
            found.append(check_sizes(path))
    return found


def newest_complete(folder: Path) -> CheckpointFolder | None:
    """Find the newest checkpoint whose every byte is as committed.

    A damaged one is renamed `.bad`, named in a printed line, and the one before it is tried. Call it on one
    rank only.

    Raises:
        CheckpointError: one cannot be read for another reason than damage (permissions, a later format).
    """
    for path in reversed(named_checkpoints(folder)):
        try:
            return verify(path)
        except DamagedCheckpointError as error:
            aside = _free_name(path, ".bad")
            path.rename(aside)
            say(f"Damaged checkpoint, now called {aside.name}: {error.found}. Trying the one before.")
    return None


def verify(path: Path) -> CheckpointFolder:
    """Compare every file of a checkpoint with its manifest, by size and digest.

    Raises:
        DamagedCheckpointError: names the file and what differs.
        CheckpointError: a file cannot be read.
    """
    folder = check_sizes(path)
    _check_digests(path, folder.manifest.files)
    return folder


def check_sizes(path: Path) -> CheckpointFolder:
    """Compare the names and sizes of a checkpoint's files with its manifest.

    Raises:
        DamagedCheckpointError: names the file and what differs.
    """
    return _with_all_files(CheckpointFolder(path, read_manifest(path)))


def _with_all_files(folder: CheckpointFolder) -> CheckpointFolder:
    if not folder.is_export and folder.path.name != name_of_step(folder.step):
        what = f"step {folder.step} in a folder called {folder.path.name}"
        raise _difference(folder.path / MANIFEST_NAME, what)
    for name, record in folder.manifest.files.items():
        file = folder.path / name
        if not file.is_file():
            raise _difference(file, "no such file")
        if (size_bytes := file.stat().st_size) != record.size_bytes:
            raise _difference(file, f"{size_bytes} bytes instead of {record.size_bytes}")
    return folder


def _check_digests(
    path: Path, files: Mapping[str, FileRecord], advance: Callable[[int], None] = lambda num_bytes: None
) -> None:
    """Compare the content of files of a folder with their records; `advance` is told of bytes read."""
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


def _digest_of(file: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    memory = memoryview(bytearray(BLOCK_BYTES))
    with file.open("rb", buffering=0) as content:
        while num_bytes := content.readinto(memory):
            digest.update(memory[:num_bytes])
            advance(num_bytes)
    return digest.hexdigest()


def _difference(file: Path, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        "every file of a checkpoint must be as its manifest says", f"{what}: {file}", "Use another checkpoint"
    )


def _free_name(path: Path, ending: str) -> Path:
    aside = path.with_name(path.name + ending)
    number = 2
    while aside.exists():
        aside = path.with_name(f"{path.name}{ending}.{number}")
        number += 1
    return aside
