"""Samples of programs and what became of them: JSON lines that are on disk when they are said to be.

    FOLDER/TASK/request.json     what was asked for
                samples.jsonl    one line per sample, batch after batch
                verdicts.jsonl   one line per sample that was run

A killed evaluation goes on behind the last whole batch. A batch is a pure function of the request and of its place.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self, final

from mtp_lightning.errors import DataError
from mtp_lightning.files.durable import force, replace_durably, sync
from mtp_lightning.files.lock import holder_of, try_lock
from mtp_lightning.files.untrusted import OddFileError, read_object, reason_of, shown

REQUEST: Final = "request.json"
SAMPLES: Final = "samples.jsonl"
VERDICTS: Final = "verdicts.jsonl"
Request = dict[str, Any]
Line = dict[str, Any]
PLACE: Final[Mapping[str, Any]] = {"task_id": str, "temperature": (int, float), "sample": int}
SAMPLE: Final = {**PLACE, "completion": str}
VERDICT: Final = {**PLACE, "outcome": str}
"""Fields of the lines."""


@final
class LineLog:
    """A file of JSON objects, one a line, that only grows; what a killed process left of a line is cut off."""

    def __init__(self, path: Path, fields: Mapping[str, type | tuple[type, ...]]) -> None:
        """Take up what is there.

        Args:
            path: The file; it need not be there.
            fields: What each line has.

        Raises:
            DataError: A line that is not the last one is something else.
        """
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        sync(path.parent)
        self.lines: list[Line] = []
        self._ends = [0]
        for content in self._file:
            line = _parsed(content, fields)
            if line is None:
                break
            self.lines.append(line)
            self._ends.append(self._ends[-1] + len(content))
        if self._file.read(1):
            self._file.close()
            raise DataError(
                f"every line of {path} must be as it was written",
                f"line {len(self.lines) + 1}: {shown(content.decode(errors='replace'))}",
                f"Correct it, or remove it and those behind it, or all of {path.name}",
            )
        self.cut(len(self.lines))

    def cut(self, num_lines: int) -> None:
        """Keep so many lines."""
        del self.lines[num_lines:], self._ends[num_lines + 1 :]
        self._file.truncate(self._ends[-1])
        self._file.seek(self._ends[-1])

    def append(self, lines: Sequence[Line]) -> None:
        """Add lines, on disk when this returns."""
        for line in lines:
            content = json.dumps(line).encode() + b"\n"
            self._file.write(content)
            self._ends.append(self._ends[-1] + len(content))
        self._file.flush()
        force(self._file.fileno())
        self.lines += lines

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _parsed(content: bytes, fields: Mapping[str, type | tuple[type, ...]]) -> Line | None:
    try:
        line = json.loads(content)
    except (ValueError, RecursionError):
        return None
    is_whole = content.endswith(b"\n") and isinstance(line, dict)
    return line if is_whole and all(isinstance(line.get(name), kind) for name, kind in fields.items()) else None


@contextmanager
def own_folder(folder: Path, request: Request) -> Iterator[None]:
    """Begin a folder for a request, or go on there; keep all other evaluations out of it.

    Raises:
        DataError: One is at work there, or it was begun for another request: names all that differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not try_lock(descriptor):
            found = f"{folder}, in which {holder_of(descriptor)} is at work"
            raise DataError("one evaluation at a time must use a folder", found, "Wait for it, or give another --out")
        _take_up(folder, request)
        yield
    finally:
        os.close(descriptor)


def _take_up(folder: Path, request: Request) -> None:
    request = json.loads(json.dumps(request))  # as it will be read
    begun = _read_request(folder)
    if begun is None:
        replace_durably(folder / REQUEST, json.dumps(request, indent=2).encode() + b"\n")
        return
    names = [name for name in {**begun, **request} if begun.get(name) != request.get(name)]
    if names:
        raise DataError(
            f"samples that are there ({folder}) must have been asked for in the same way",
            "; ".join(f"{name} {_said(request.get(name))}, there {_said(begun.get(name))}" for name in names),
            "Ask for the same, or give another --out",
        )


def _read_request(folder: Path) -> Request | None:
    try:
        return read_object(folder / REQUEST)
    except FileNotFoundError:
        return None
    except (OSError, OddFileError) as error:
        found = f"{reason_of(error)}, {folder / REQUEST}"
        raise DataError(f"{REQUEST} must be as it was written", found, f"Remove {folder}") from None


def _said(value: object) -> str:
    return "not given" if value is None else shown(value)
