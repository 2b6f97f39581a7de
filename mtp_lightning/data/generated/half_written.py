"""What a half-written folder was begun for: only the same request may go on with it."""

import json
from collections.abc import Mapping
from pathlib import Path

from mtp_lightning.data.shards.build import sync
from mtp_lightning.data.untrusted import bounded_content, shown
from mtp_lightning.errors import DataError

REQUEST_NAME = "request.json"
MOST_REQUEST_BYTES = 1 << 20
Setting = str | int | float | None


def take_up(folder: Path, request: Mapping[str, Setting]) -> None:
    """Begin a folder for a request, or go on with one that was begun for the same.

    Raises:
        DataError: It was begun for another request.
    """
    check_request(folder, request)
    record = folder / REQUEST_NAME
    if record.exists():
        return
    for path in folder.glob("*.log"):  # of a folder that was about to be removed
        path.unlink()
    unfinished = record.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(dict(request), indent=1) + "\n")
    sync(unfinished)
    unfinished.rename(record)
    for path in (folder, folder.parent):
        sync(path)


def check_request(folder: Path, request: Mapping[str, Setting]) -> None:
    """Refuse to go on with a folder that was begun for another request.

    Raises:
        DataError: It was; names every setting that differs.
    """
    record = folder / REQUEST_NAME
    try:
        begun = json.loads(bounded_content(record, MOST_REQUEST_BYTES))
        if not isinstance(begun, dict):
            raise ValueError(f"a {type(begun).__name__}")
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{record} must be as it was written", str(error), f"Remove {folder} to begin anew") from error
    names = [name for name in {**begun, **request} if begun.get(name) != request.get(name)]
    if names:
        raise DataError(
            f"half-written shards ({folder}) must be finished with the settings they were begun with",
            "; ".join(f"{name} {_said(request.get(name))}, begun with {_said(begun.get(name))}" for name in names),
            f"Give those, or another --out; or begin anew by removing {folder}, unless a process is at work there",
        )


def _said(value: Setting) -> str:
    return "not given" if value is None else shown(value)
