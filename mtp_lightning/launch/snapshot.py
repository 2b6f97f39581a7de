"""What a job is submitted with, kept beside it: the script, resolved recipes, the code's revision, the environment."""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from mtp_lightning.errors import RunFolderError, refusal_of, remedy_of
from mtp_lightning.files.atomic_folder import removed_on_error

SUBMISSION = re.compile(r"submit_[0-9]{1,9}\Z")
MOST_DIFF_BYTES = 20_000_000


def next_folder(run: Path) -> Path:
    """Name the folder of the next submission of a run; it is not made yet."""
    names = [path.name for path in (run / "logs").glob("submit_*")]
    numbers = [int(name.removeprefix("submit_")) for name in names if SUBMISSION.match(name)]
    return run / "logs" / f"submit_{max(numbers, default=0) + 1}"


def freeze(folder: Path, files: Mapping[Path, str], facts: Mapping[str, Any]) -> None:
    """Write a submission's files, and beside them what code and which packages it was made with.

    Raises:
        RunFolderError: The folder cannot be written to.
    """
    revision, diff = code_version(Path(__file__).parents[2])
    environment = {
        "submitted_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "host": platform.node(),
        "python": platform.python_version(),
        "git_revision": revision,
        "changes": "changes.diff" if diff else None,
        "packages": dict(sorted((found.name, found.version) for found in distributions())),
        **facts,
    }
    content = {"environment.json": json.dumps(environment, indent=2) + "\n"} | ({"changes.diff": diff} if diff else {})
    try:
        folder.mkdir(parents=True)
        with removed_on_error(folder):
            for path, text in {**files, **{folder / name: text for name, text in content.items()}}.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise RunFolderError(
            "a submission must be written into the run folder", refusal_of(error, folder), remedy_of(error, "run.dir")
        ) from None


def code_version(source: Path) -> tuple[str | None, str]:
    """Return the git revision of a source tree, and what was changed since; None and nothing where there is none."""
    revision = _git(source, "rev-parse", "HEAD")
    return (
        (None, "") if revision is None else (revision.strip(), (_git(source, "diff", "HEAD") or "")[:MOST_DIFF_BYTES])
    )


def revision_of(source: Path) -> str | None:
    """Return the git revision of a source tree, `-dirty` behind it where files differ; None where there is none.

    In place of `git describe --dirty`, which writes to the repository: a lock of its own stays there where the system
    ends it at a limit (`ulimit -f`), and keeps everybody else out.
    """
    found = _git(source, "describe", "--always", "--abbrev=40")
    if found is None:
        return None
    return found.strip() + ("-dirty" if _git(source, "status", "--porcelain", "--untracked-files=no") else "")


def _git(source: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(source), *arguments]
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=False, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "surrogateescape") if done.returncode == 0 else None
