"""Prompts from the command line and from files."""

import json
from pathlib import Path
from typing import Any

from mtp_lightning.errors import DecodingError

KEYS = ("prompt", "text")


def read_prompts(path: Path) -> list[bytes]:
    """Read prompts from a file: one per line, or, from *.jsonl, the `prompt` (or `text`) of every line's object.

    Raises:
        DecodingError: The file cannot be read, holds no prompt, or has a line that is none.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DecodingError(
            "the file of prompts must be readable", f"{path}: {error.strerror}", "Name another"
        ) from None
    is_json = path.suffix == ".jsonl"
    prompts = [_prompt_of(line, path, number) if is_json else line for number, line in enumerate(lines, 1) if line]
    if not prompts:
        raise DecodingError("a file of prompts must hold one", f"none in {path}", "Write one prompt per line")
    return prompts


def _prompt_of(line: bytes, path: Path, number: int) -> bytes:
    try:
        document: Any = json.loads(line)
    except ValueError:
        document = None
    values = [document[key] for key in KEYS if key in document] if isinstance(document, dict) else []
    if not values or not isinstance(values[0], str):
        raise DecodingError(
            'every line of a *.jsonl file of prompts must be an object with a text "prompt" (or "text")',
            f"line {number} of {path}: {line[:60].decode(errors='replace')}",
            "Correct the line, or name the file *.txt for one prompt per line",
        )
    return values[0].encode()
