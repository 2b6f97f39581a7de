"""YAML files that somebody else may have written: of bounded size, parsed without surprises."""

from pathlib import Path
from typing import Any

from mtp_lightning.files.untrusted import NO_TEXT, OddFileError, read_bounded
from mtp_lightning.recipe.loading import parse as reading

MOST_YAML_BYTES = 2**22


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        OSError: It cannot be read.
        OddFileError: It is something else.
    """
    content = read_bounded(path, MOST_YAML_BYTES)
    try:
        return parse_yaml(content.decode())
    except UnicodeDecodeError:
        raise OddFileError(NO_TEXT) from None


def parse_yaml(text: str) -> Any:
    """Parse YAML.

    Raises:
        OddFileError: It is something else.
    """
    try:
        return reading.parse_yaml(text)
    except ValueError as error:
        raise OddFileError(f"no YAML ({error})") from None
