"""Paths as users write them: `~` and variables of the environment are expanded here, for recipes, sites and options."""

import os
import re
from collections.abc import Callable
from pathlib import Path

MOST_NAME_BYTES, MOST_PATH_BYTES = 255, 4095  # that Linux takes
_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}?|(\w+))", re.ASCII)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # of a Path, which has lost a slash of `s3://`


def expanded(path: str) -> str:
    """Expand `$NAME` and `${NAME}`, and `~` or `~USER` at the beginning; what is not known stays as it is.

    So does a path with a `$` that leads somewhere as it is: names of folders may hold one.

    >>> os.environ["SCRATCH"] = "/scratch/me"
    >>> expanded("$SCRATCH/runs"), expanded("s3://bucket/${SCRATCH_OF_NOBODY}"), expanded("US$")
    ('/scratch/me/runs', 's3://bucket/${SCRATCH_OF_NOBODY}', 'US$')
    """
    try:
        if "$" in path and os.path.lexists(path):
            return path
        return os.path.expanduser(os.path.expandvars(path))  # noqa: PTH111, a Path would change URLs
    except ValueError:  # no name of a user can be looked up, as it holds a NUL or half a character
        return path


def leads_to(path: Path, kind: Callable[[Path], bool] = Path.exists) -> bool:
    """Say whether a path exists (or `Path.is_file`, `Path.is_dir`), also of names that a system refuses to look up."""
    try:
        return kind(path)
    except (OSError, ValueError):
        return False


def is_url(name: str) -> bool:
    """Say whether something lies somewhere that is no folder of this machine.

    >>> is_url("https://example.org/shards"), is_url("shards/web")
    (True, False)
    """
    return "://" in name


def remedy_for(path: str, *, may_be_url: bool = False) -> str | None:
    """Say what to do about a path that cannot be used, after it was expanded; None for one that may lead somewhere.

    >>> remedy_for("$SCRATCH_OF_NOBODY/runs")
    'The variable SCRATCH_OF_NOBODY is not set: set it, or write the path out.'
    """
    if not path.strip():
        return "It is empty: name a file or folder."
    if "\0" in path or not _is_encodable(path):
        return "Remove the character NUL, or half of a character, which no path can hold."
    if (found := _VARIABLE.search(path)) and not os.path.lexists(path):
        name = found[1] or found[2] or found[0]
        is_set = name in os.environ  # its value holds another variable, or two keys of a mapping would be the same
        reason = "cannot be expanded here" if is_set else "is not set: set it"
        return f"The variable {name} {reason}, or write the path out."
    if path.startswith("~") and not os.path.lexists(path):
        return f"There is no home of {path.partition('/')[0][1:] or 'this user'}: write the path out."
    if is_url(path) or _SCHEME.match(path):
        return None if may_be_url else "It is a URL: copy what is there to this machine, or mount it, and name that."
    return _remedy_for_length(path)


def _is_encodable(path: str) -> bool:
    try:
        return bool(os.fsencode(path))
    except UnicodeEncodeError:
        return False


def _remedy_for_length(path: str) -> str | None:
    names = [len(name.encode(errors="replace")) for name in path.split("/")]
    is_pattern = set("{*?[") & set(path)  # judged by what it stands for, when that is opened
    if not is_pattern and max(names) > MOST_NAME_BYTES:
        return f"Shorten it: one of its names has {max(names):,} bytes, and a file system takes {MOST_NAME_BYTES}."
    if sum(names) + len(names) > MOST_PATH_BYTES:
        return f"Shorten it: it has {sum(names) + len(names):,} bytes, and a system takes {MOST_PATH_BYTES:,}."
    return None
