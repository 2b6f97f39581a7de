"""Rows of files of text, one after another: lines of JSON, values of an array, records of a CSV table."""

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

from mtp_lightning.data.text.compressed import READ_BYTES
from mtp_lightning.data.text.documents import MOST_ROW_BYTES, Row
from mtp_lightning.data.text.records import RowFault
from mtp_lightning.files.untrusted import shown

SPACE = re.compile(r"[ \t\n\r]*")
DELIMITERS = (",", ";", "\t", "|")
QUOTED = re.compile(r'"[^"]*"')
EXCEL_DELIMITER = re.compile(rb"sep=([,;\t|])\r?\n")
"""A first line by which spreadsheets say what parts the columns."""


def json_rows(stream: io.BufferedReader, *, is_jsonl: bool) -> tuple[str, Iterator[Row]]:
    """Return the values of a file of JSON, and what one is called: a line or a record.

    Records are the elements of an array, or values over several lines, one after another.
    """
    first, second = (*stream.peek(READ_BYTES).lstrip().split(b"\n", 2), b"", b"")[:2]
    line = first.strip()
    if line.startswith(b"["):
        is_lines = is_jsonl and line != b"[" and _is_record(second)
    else:
        is_lines = (
            line != b"{"
            if is_jsonl
            else line.endswith(b"}") or not line.startswith(b"{") or len(line) > READ_BYTES // 2
        )
    return ("line", lines_of(stream)) if is_lines else ("record", values_of(stream))


def _is_record(line: bytes) -> bool:
    """Tell whether a line is one whole object, or one whole chat."""
    try:
        return isinstance(json.loads(line), dict | list)
    except (ValueError, RecursionError):
        return False


def lines_of(stream: io.BufferedReader) -> Iterator[Row]:
    """Yield lines, a fault in place of one that is too long to be held."""
    while line := stream.readline(MOST_ROW_BYTES):
        is_cut = len(line) == MOST_ROW_BYTES and not line.endswith(b"\n")
        if is_cut:
            while line and not line.endswith(b"\n"):
                line = stream.readline(READ_BYTES)
        yield _too_long("a line") if is_cut else line


def _too_long(what: str) -> RowFault:
    return RowFault("too long", f"{what} of more than {MOST_ROW_BYTES:,} bytes")


def values_of(stream: io.BufferedReader) -> Iterator[Row]:
    """Yield the text of each value of an array, or of values that stand one after another.

    Raises:
        ValueError: what is there is no JSON, so what comes after it cannot be told.
    """
    with _as_text(stream) as text:
        yield from _values(_Window(text))


@contextmanager
def _as_text(stream: io.BufferedReader) -> Iterator[io.TextIOWrapper]:
    text = io.TextIOWrapper(stream, "utf-8", "surrogateescape", newline="")
    try:
        yield text
    finally:
        text.detach()  # else it closes the stream


def _values(window: "_Window") -> Iterator[bytes]:
    is_array = window.mark() == "["
    window.at += is_array
    while (mark := window.mark()) and not (is_array and mark == "]"):
        yield window.value().encode("utf-8", "surrogateescape")
        if is_array and (mark := window.mark()) != "]":
            if mark != ",":
                raise ValueError(f"{shown(repr(mark))} between two values" if mark else "an array without its end")
            window.at += 1
    if is_array:
        if not mark:
            raise ValueError("an array without its end")
        window.at += 1
        if window.mark():
            raise ValueError("something after the end of the array")


class _Window:
    """What is at hand of a long text of JSON."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text
        self._content = ""
        self._decoder = json.JSONDecoder()
        self.at = 0

    def mark(self) -> str:
        """Return the next character that is no blank; none at the end."""
        while True:
            found = SPACE.match(self._content, self.at)
            self.at = found.end() if found else self.at
            if self.at < len(self._content):
                return self._content[self.at]
            if not self._fill():
                return ""

    def value(self) -> str:
        """Return the text of the next value, which begins here.

        Raises:
            ValueError: there is none, or it is too long.
        """
        while True:
            try:
                _, end = self._decoder.raw_decode(self._content, self.at)
            except RecursionError as error:
                raise ValueError("lists within lists, too deep") from error
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(self._content) - 16
                if not is_cut or not self._fill():
                    raise ValueError(
                        f"{error.msg} after {shown(repr(self._content[max(self.at, error.pos - 40) : error.pos]))}"
                    ) from error
            else:
                if end < len(self._content) or not self._fill():  # a number might go on
                    begin, self.at = self.at, end
                    return self._content[begin:end]

    def _fill(self) -> bool:
        """Read as much again as is at hand, of what comes; forget what has been read."""
        rest = self._content[self.at :]
        if len(rest) > MOST_ROW_BYTES:
            raise ValueError(f"a value of more than {MOST_ROW_BYTES:,} characters")
        more = self._text.read(max(READ_BYTES, len(rest)))
        self._content, self.at = rest + more, 0
        return bool(more)


def table_rows(stream: io.BufferedReader, *, is_tsv: bool) -> Iterator[Row]:
    """Yield the records of a table of text, by the names in its first row; quoted fields may hold line breaks.

    Columns of `*.csv` are parted by the first of , ; tab | that stands in its first row outside of quotes, or by what
    a line `sep=;` before it says; those of `*.tsv` by tabs. Columns without a name are left out.

    Raises:
        ValueError: the first row is no row of names, or a quoted field has no end.
    """
    said = EXCEL_DELIMITER.match(stream.peek(READ_BYTES))
    if said:
        stream.read(said.end())
    head = QUOTED.sub("", stream.peek(READ_BYTES).decode("utf-8", "replace")).lstrip("\r\n")
    names = re.split(r"[\r\n]", head, maxsplit=1)[0]
    delimiter = next((mark for mark in DELIMITERS if mark in names), ",")
    delimiter = "\t" if is_tsv else said[1].decode() if said else delimiter
    csv.field_size_limit(MOST_ROW_BYTES)
    with _as_text(stream) as text:
        yield from _records(csv.reader(_bounded_lines(text), delimiter=delimiter, strict=True))


def _records(reader: Iterator[list[str]]) -> Iterator[Row]:
    try:
        names = next((cells for cells in reader if cells), [])
    except csv.Error as error:
        raise ValueError(f"a first row that is no row of names: {error}") from error
    named = [name for name in names if name]
    if len(set(named)) < len(named) or not named:
        raise ValueError(f"two columns of one name, or none: {shown(', '.join(names))}")
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise ValueError("a quoted field without its end") from error
            yield RowFault("damaged row", str(error))
            continue
        if cells:
            yield _record(names, cells)


def _record(names: list[str], cells: list[str]) -> Row:
    if len(cells) > len(names) and not any(cells[len(names) :]):  # as spreadsheets fill rows up
        cells = cells[: len(names)]
    if len(cells) != len(names):
        return RowFault("other number of cells", f"{len(cells)} cells under {len(names)} names")
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return RowFault("invalid UTF-8", "bytes that are not UTF-8")
    if any("\0" in cell for cell in cells):
        return RowFault("NUL bytes", "bytes that are zero, which no text has")
    return {name: cell for name, cell in zip(names, cells, strict=True) if name}


def _bounded_lines(text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(MOST_ROW_BYTES):
        if len(line) == MOST_ROW_BYTES and not line.endswith("\n"):
            raise ValueError(f"a line of more than {MOST_ROW_BYTES:,} characters")
        yield line
