"""Files of problems, one JSON object per line; they may be compressed."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mtp_lightning.data.text.compressed import DAMAGE, opened_text
from mtp_lightning.errors import DataError
from mtp_lightning.files.untrusted import OddFileError, described, open_regular, reason_of, shown

Row = Mapping[str, Any]


def json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the objects of a file, with the numbers of their lines.

    Raises:
        DataError: It cannot be read; says in which line something is wrong.
    """
    try:
        with open_regular(path) as raw, opened_text(raw, path.name, None) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _row(line, number, path)
    except (*DAMAGE, OddFileError) as error:
        raise DataError("a file of problems must be readable", f"{path}: {reason_of(error)}", "Name another") from None


def _row(line: bytes, number: int, path: Path) -> Row:
    try:
        row = json.loads(line)
        found = described(row)
    except (ValueError, RecursionError) as error:
        row, found = None, shown(error)
    if isinstance(row, dict):
        return row
    raise DataError(
        "every line of a file of problems must be a JSON object",
        f"line {number} of {path}: {found}",
        "Correct the line",
    )
