"""The run folder: whose it is, what is in it, where to go on.

A marker that the run makes (`launch.run_marker`), recipe.yaml (resolved), metrics.csv, tensorboard/, summary.json,
curves.png, checkpoints/, and for every start logs/attempt_<k>/ with the recipe and the environment of that start.
Where they are asked for: wandb/, mlflow.db, and logging.json with the ids of their runs. A lock keeps a second process
out.
"""

import contextlib
import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from mtp_lightning.checkpoint.format.folder import CheckpointFolder, newest_complete
from mtp_lightning.console.progress import say
from mtp_lightning.errors import CheckpointError, RunFolderError, refusal_of
from mtp_lightning.files.durable import replace_durably
from mtp_lightning.files.lock import ANOTHER, try_lock
from mtp_lightning.launch.run_marker import MARKER, SAVED, check_may_be_run, claim, is_run, mark, read_marker
from mtp_lightning.launch.snapshot import revision_of
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe import Recipe, changed_fields, load_recipe, recipe_to_yaml
from mtp_lightning.recipe.loading.phases import phases_of
from mtp_lightning.recipe.schema.phases import FOLDER as PHASES
from mtp_lightning.training.draft_vocabulary import with_draft_vocabulary
from mtp_lightning.training.step.skipped_steps import RECORDS, read_rollbacks

FILES = (
    *(".lock", MARKER, str(RECORDS), "recipe.yaml", "metrics.csv", "summary.json", "curves.png", "logging.json"),
    "mlflow.db",
)
FOLDERS = ("checkpoints", "logs", "phases", "tensorboard", "wandb")
CONTINUABLE = {"optimizer", "objective", "data", "batch", "run"}
"""Sections whose changes leave the model and what is trained of it as they are."""
ATTEMPT = re.compile(r"attempt_[0-9]{1,9}\Z")
PACKAGES = ("torch", "lightning", "deepspeed", "torchmetrics", "numpy", "safetensors", "webdataset", "mtp_lightning")


@dataclass(frozen=True)
class Opened:
    """A run folder that this process may write to."""

    path: Path
    attempt: Path  # logs of this start
    checkpoint: CheckpointFolder | None  # where to go on; None for a run that has no checkpoint yet
    recipe: Recipe  # with the ids of its draft vocabulary


@contextlib.contextmanager
def opened_run_folder(recipe: Recipe, ranks: Ranks) -> Iterator[Opened]:
    """Open the recipe's run folder, new or to be continued: the first rank does it and holds its lock.

    Raises:
        CheckpointError: The run has lost all its checkpoints.
        RunFolderError: Another process holds it, it belongs to another recipe, or no run has made it.
    """
    with contextlib.ExitStack() as until_the_end:
        opened: Opened | None = None
        with ranks.raise_on_all_ranks():
            if ranks.is_first:
                opened = until_the_end.enter_context(_opened(recipe))
        yield ranks.broadcast(opened)


@contextlib.contextmanager
def _opened(recipe: Recipe) -> Iterator[Opened]:
    folder = Path(recipe.run.dir)
    with contextlib.ExitStack() as until_the_end:
        try:
            opened = _begin(folder, recipe, until_the_end)
        except OSError as error:
            raise RunFolderError(
                "run.dir must be a folder that can be written to",
                refusal_of(error, folder),
                "Make room or repair access there, or give another run.dir; checkpoints have not been touched.",
            ) from error
        yield opened


def _begin(folder: Path, recipe: Recipe, until_the_end: contextlib.ExitStack) -> Opened:
    """Take a run folder in hand, and write down what starts there."""
    _check_writable(folder)
    check_may_be_run(folder)
    if recipe.run.restart:
        _move_aside(folder)
    _check_entries(folder)
    claim(folder)
    until_the_end.enter_context(_locked(folder))
    _check_phases(folder, recipe)
    checkpoint = newest_complete(folder / "checkpoints")
    if not recipe.phases:  # each of which is a run of its own
        recipe = with_draft_vocabulary(recipe, folder / "recipe.yaml" if checkpoint is not None else None)
    if checkpoint is not None:
        check_changes(folder, recipe)
    else:
        _check_not_lost(folder)
    attempt = _next_attempt(folder)
    for path in (folder / "recipe.yaml", attempt / "recipe.yaml"):
        replace_durably(path, recipe_to_yaml(recipe).encode())
    replace_durably(attempt / "environment.json", json.dumps(_environment(), indent=2).encode() + b"\n")
    return Opened(folder, attempt, checkpoint, recipe)


def _check_writable(folder: Path) -> None:
    whole = [folder, *folder.absolute().parents]
    dangling = next((path for path in whole if path.is_symlink() and not path.exists()), None)
    if dangling:
        raise RunFolderError(
            "run.dir must be a folder that can be written to",
            f"{dangling}, a link to {dangling.readlink()}, which is not there",
            "Make that folder, or give another run.dir.",
        )
    existing = next(path for path in whole if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise RunFolderError(
            "run.dir must be a folder that can be written to",
            f"{existing}, which is {'read-only' if existing.is_dir() else 'a file'}",
            "Give another run.dir.",
        )


def _move_aside(folder: Path) -> None:
    """Rename an earlier run to the first free NAME.1, NAME.2, ..., so that a fresh start overwrites nothing."""
    if not folder.exists():
        return
    with _locked(folder):
        number = next(k for k in range(1, sys.maxsize) if not folder.with_name(f"{folder.name}.{k}").exists())
        aside = folder.with_name(f"{folder.name}.{number}")
        folder.rename(aside)
    say(f"Starting afresh: the earlier run is now {aside}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel lets it go when the process ends, however it ends."""
    with (folder / ".lock").open("a+") as file:
        if not try_lock(file):
            file.seek(0)
            raise RunFolderError(
                "one process at a time may write to a run folder",
                f"{folder} in use by {file.read().strip() or ANOTHER}",
                "Wait for it, stop it, or give another run.dir.",
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield


def _check_entries(folder: Path) -> None:
    """Refuse a run folder in which something stands where the run writes; it would be found out at the end only."""
    for name in (*FILES, *FOLDERS):
        path = folder / name
        if path.exists() and not (path.is_file() if name in FILES else path.is_dir()):
            raise RunFolderError(
                f"{name} of a run must be a {'file' if name in FILES else 'folder'}",
                f"{path}, which is {'a folder' if path.is_dir() else 'none'}",
                "Move it away, or give another run.dir.",
            )


def _check_phases(folder: Path, recipe: Recipe) -> None:
    """Refuse to lay a run with phases over one without, or other phases over those that there are."""
    there = sorted(path.name for path in (folder / PHASES).glob("*") if is_run(path))
    own = [phase.title for phase in phases_of(recipe)] if recipe.phases else []
    strangers = [name for name in there if name not in own]
    if strangers or (own and (folder / "checkpoints").is_dir()):
        raise RunFolderError(
            f"a run must go on with the phases that {folder} began with",
            f"{', '.join(strangers) or 'a run without phases'} there, and {', '.join(own) or 'none'} in the recipe",
            "Give another run.dir, take the change back, or start over with run.restart=true (the old run is kept).",
        )


def _check_not_lost(folder: Path) -> None:
    """Refuse to begin again where checkpoints have been: somebody may still want them back.

    Raises:
        CheckpointError: There were some, and none is whole.
    """
    first, rolled_back = read_marker(folder).get(SAVED), read_rollbacks(folder)
    if first is None or (rolled_back and rolled_back[-1].checkpoint == 0):
        return
    there = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    raise CheckpointError(
        "a run that has saved checkpoints must go on from one of them",
        f"none that is whole in {folder / 'checkpoints'}, which holds {', '.join(there) or 'nothing'}; "
        f"the first was of step {first}",
        "Bring them back from a copy, or start over with run.restart=true (what is there is kept, under another name).",
    )


def note_saved(folder: Path, step: int, recipe_text: str) -> None:
    """Note durably, once, that a run has committed a checkpoint; what was removed while it ran is a run again."""
    if not is_run(folder):
        say(f"{folder} was removed while it ran: made again, without the files of before")
        mark(folder)
        replace_durably(folder / "recipe.yaml", recipe_text.encode())
    note = read_marker(folder)
    if SAVED not in note:
        replace_durably(folder / MARKER, json.dumps({**note, SAVED: step}).encode() + b"\n")


def check_changes(folder: Path, recipe: Recipe) -> None:
    """Refuse to go on from a checkpoint of another recipe; report changes that may be made on the way."""
    changes = changed_fields(load_recipe(folder / "recipe.yaml").recipe, recipe)
    refused = [str(change) for change in changes if change.verdict == "refuse"]
    if refused:
        sections = {change.path.partition(".")[0] for change in changes if change.verdict == "refuse"}
        way = f"from these weights in another folder (run.dir=ANOTHER init.path={folder} init.optimizer=true)"
        raise RunFolderError(
            f"a run must go on with the recipe that {folder} began with",
            f"{len(refused)} changed field{'s' if len(refused) > 1 else ''}:\n  " + "\n  ".join(refused) + "\n",
            "Give another run.dir, take the changes back, or start over with run.restart=true (the old run is kept)"
            + (f"; to train on with the new values, begin a new run {way}." if sections <= CONTINUABLE else "."),
        )
    for change in changes:
        say(f"Changed since this run began: {change}")


def _next_attempt(folder: Path) -> Path:
    logs = folder / "logs"
    numbers = [int(path.name.removeprefix("attempt_")) for path in logs.glob("attempt_*") if ATTEMPT.match(path.name)]
    attempt = logs / f"attempt_{max(numbers, default=0) + 1}"
    attempt.mkdir(parents=True)
    return attempt


def _environment() -> dict[str, object]:
    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "packages": {name: _version_of(name) for name in PACKAGES},
        "git_revision": revision_of(Path(__file__).parent),
    }


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
