"""Whose a folder is: a run's, which bears a marker that the run made, or somebody else's, which is left alone."""

import json
import shlex
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from mtp_lightning import __version__
from mtp_lightning.errors import RunFolderError
from mtp_lightning.files.durable import naming

MARKER = ".mtp_run.json"
SAVED = "first_checkpoint"  # in the marker: step of the first checkpoint that was committed
SHOWN = 5  # names of a foreign folder's entries


def is_run(folder: Path) -> bool:
    """Say whether a run has made this folder."""
    return (folder / MARKER).is_file()


def check_may_be_run(folder: Path, field: str = "run.dir") -> None:
    """Refuse a folder that is neither new, nor empty, nor a run's; nothing is written.

    Raises:
        RunFolderError: Saying what it is.
    """
    if is_run(folder) or not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    what, hint = kind_of(folder, field)
    if is_run(folder):  # another process has marked it since
        return
    raise RunFolderError(
        f"{field} must be a new folder, an empty one, or one that a run has made ({MARKER} in it)",
        f"{folder}, which is {what}",
        f"{hint} Nothing has been changed.",
    )


def claim(folder: Path) -> None:
    """Make a folder a run's, if it is not one by now.

    Raises:
        RunFolderError: It is something else.
    """
    check_may_be_run(folder)
    mark(folder)


def mark(folder: Path) -> None:
    """Put the marker of a run into a folder that is known to be one's own."""
    folder.mkdir(parents=True, exist_ok=True)
    note = {"made_by": f"mtp_lightning {__version__}", "made_at": datetime.now(UTC).isoformat(timespec="microseconds")}
    marker = folder / MARKER
    with suppress(FileExistsError), naming(marker), marker.open("x", encoding="utf-8") as file:
        try:
            file.write(json.dumps(note) + "\n")
            file.flush()
        except OSError:
            marker.unlink()  # an empty one would not say when the run was made
            raise


def read_marker(folder: Path) -> dict[str, object]:
    """Read what a marker says beyond being there; nothing where it cannot be read."""
    with suppress(OSError, ValueError):
        note = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return note if isinstance(note, dict) else {}
    return {}


def kind_of(folder: Path, field: str = "run.dir") -> tuple[str, str]:
    """Say what a folder is that no run has made, and what to do instead of training in it, where `field` names it."""
    if not folder.is_dir():
        return "a file", f"Give another {field}."
    names = {path.name for path in folder.iterdir()}
    new = f"Give a new {field}"
    own = shlex.quote(str(folder))
    start = f"Start a new run from its weights: mtp train {own}/recipe.yaml init.path={own} run.dir=runs/NEW."
    if names >= {"manifest.json", "state.json"} or folder.parent.name == "checkpoints":
        return "a checkpoint", f"To go on with its run, give {folder.parent.parent}; or {start[0].lower()}{start[1:]}"
    if "environment.json" in names and folder.parent.name == "logs":
        return "the log of one start", f"To go on with its run, give {folder.parent.parent}."
    if any(name.endswith(".safetensors") for name in names) and "recipe.yaml" in names:
        return "a model that was exported, imported or extended", start
    if "config.json" in names:
        return "a model in Hugging Face's layout", f"Import it: mtp import {own} --out MODEL; then {new}."
    if "manifest.json" in names:
        return "a folder of shards", f"{new}, and leave it to data.shards."
    listed = ", ".join(sorted(names)[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"a folder that holds {listed}{more}", f"{new}."
