"""Paths among the arguments and options of all verbs, where no shell has expanded them: --out='~/x', --out=~/x."""

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import typer

from mtp_lightning.errors import RunFolderError
from mtp_lightning.files.paths import expanded, remedy_for


def expand_places(app: typer.Typer) -> None:
    """Let every verb of an app, and of the apps in it, be called with expanded paths."""
    for command in app.registered_commands:
        if command.callback is not None:
            command.callback = _with_places(command.callback)
    for group in app.registered_groups:
        if group.typer_instance is not None:
            expand_places(group.typer_instance)


def _with_places(verb: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(verb)
    def call(**arguments: Any) -> Any:
        return verb(**{name: _expanded(value, name) for name, value in arguments.items()})

    return call


def _expanded(value: Any, name: str) -> Any:
    """Expand a path, or those of a list; anything else, and what is there by this very name, stays as it is.

    Raises:
        RunFolderError: It cannot be a path on this machine.
    """
    if isinstance(value, list):
        return [_expanded(item, name) for item in value]
    if not isinstance(value, Path) or os.path.lexists(value):
        return value
    path = expanded(str(value))
    if remedy := remedy_for(path):
        raise RunFolderError(
            f"{name} must be a path on this machine's file systems, in which ~ and $NAME can be expanded", path, remedy
        )
    return Path(path)
