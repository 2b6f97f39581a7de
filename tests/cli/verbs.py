"""All verbs of the command line, as the command line itself lists them."""

from collections.abc import Iterator
from typing import Any

import typer.main

from mtp_lightning.cli.app import app


def commands() -> dict[str, Any]:
    """Return the command of every verb by its words: "train", "data build", ..."""

    def below(command: Any, words: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        for name, sub in getattr(command, "commands", {}).items():
            yield from below(sub, (*words, name))
        if not hasattr(command, "commands"):
            yield " ".join(words), command

    return dict(below(typer.main.get_command(app), ()))
