"""Append-only log of generated documents: the request that it was begun for, then one JSON line per document.

A line carries its checksum. Whatever a killed process left behind the last whole line is cut off.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, final

from mtp_lightning.errors import DataError
from mtp_lightning.files.durable import force, sync
from mtp_lightning.files.untrusted import shown

LOG_NAME = "texts.jsonl"
MOST_REQUEST_BYTES = 1 << 20
Setting = str | int | float | None
Texts = list[list[int]]


@final
class TextLog:
    """Texts in the order in which they were generated; those that `append` has returned from survive a kill.

    First take back with `replay` what is there, then add with `append`. One process at a time; one batch is in memory.
    """

    def __init__(self, folder: Path, request: Mapping[str, Setting]) -> None:
        """Go on with the log in a folder, or begin one.

        Raises:
            DataError: It was begun for another request.
        """
        check_request(folder, request)
        descriptor = os.open(folder / LOG_NAME, os.O_RDWR | os.O_CREAT, 0o666)
        self._file: BinaryIO = os.fdopen(descriptor, "r+b")
        self.num_texts = 0
        try:
            begin = self._take_up(request)
            for path in (folder, folder.parent):
                sync(path)
            self._file.seek(begin)
        except OSError:
            with contextlib.suppress(OSError):  # of what it still holds
                self._file.close()
            raise

    def _take_up(self, request: Mapping[str, Setting]) -> int:
        """Count the texts that are there, behind the request, and return where they begin."""
        if self._next("request") is None:
            self._file.seek(0)
            self._file.write(_line("request", dict(request)))
        begin = end = self._file.tell()
        while self._next("tokens") is not None:
            self.num_texts += 1
            end = self._file.tell()
        self._cut_at(end)
        return begin

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def replay(self, num_texts: int) -> Texts | None:
        """Return the next texts, or None where fewer are left: these are cut off, to be generated again."""
        begin = self._file.tell()
        texts: Texts = []
        while len(texts) < num_texts and (tokens := self._next("tokens")) is not None:
            texts.append(tokens)
        if len(texts) == num_texts:
            return texts
        self._cut_at(begin)
        self.num_texts -= len(texts)
        return None

    def append(self, texts: Texts) -> None:
        """Add texts, on disk when this returns; of use only after the last `replay`."""
        self._file.write(b"".join(_line("tokens", text) for text in texts))
        self._cut_at(self._file.tell())
        self.num_texts += len(texts)

    def _cut_at(self, end: int) -> None:
        """Force the file up to a position to disk, and go on there."""
        self._file.flush()
        self._file.truncate(end)
        force(self._file.fileno())
        self._file.seek(end)

    def _next(self, key: str) -> Any:
        """Read a line; None at the end, and where what follows is not whole."""
        return _content(key, self._file.readline())


def check_request(folder: Path, request: Mapping[str, Setting]) -> None:
    """Refuse to go on with a log that was begun for another request.

    Raises:
        DataError: It was; names every setting that differs.
    """
    path = folder / LOG_NAME
    if not path.is_file():
        return
    with path.open("rb") as file:
        head = file.readline(MOST_REQUEST_BYTES)
    if len(head) < MOST_REQUEST_BYTES and not head.endswith(b"\n"):  # its process was killed when it had just begun
        return
    begun = _content("request", head)
    if not isinstance(begun, dict):
        hint = f"Remove {folder} to begin anew"
        raise DataError(f"{path} must be as it was written", f"a first line {shown(head)}", hint)
    names = [name for name in {**begun, **request} if begun.get(name) != request.get(name)]
    if names:
        raise DataError(
            f"half-written shards ({folder}) must be finished with the settings they were begun with",
            "; ".join(f"{name} {_said(request.get(name))}, begun with {_said(begun.get(name))}" for name in names),
            f"Give those, or another --out; or begin anew by removing {folder}, unless a process is at work there",
        )


def _said(value: Setting) -> str:
    return "not given" if value is None else shown(value)


def _line(key: str, content: Any) -> bytes:
    """Write a line of the log.

    >>> _line("tokens", [7, 8])
    b'{"crc32": 342293205, "tokens": [7, 8]}\\n'
    """
    text = json.dumps(content)
    return f'{{"crc32": {zlib.crc32(text.encode())}, "{key}": {text}}}\n'.encode()


def _content(key: str, line: bytes) -> Any:
    """Read a line of the log; None if it is not, to the byte, what was written."""
    try:
        content = json.loads(line)[key]
        return content if _line(key, content) == line else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
