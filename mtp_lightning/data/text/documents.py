"""Documents of a block: whole files, lines of JSON, rows of tables; and what is left out, with its reason."""

import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from mtp_lightning.data.text.compressed import DAMAGE, bounded, opened_text
from mtp_lightning.data.text.extras import import_extra
from mtp_lightning.data.text.kinds import (
    COMPRESSIONS,
    LFS_POINTER,
    UNMARKED,
    binary_kind,
    encoding_of,
    kind_of,
)
from mtp_lightning.data.text.records import Document, LeftOut, Reading, RowFault, document_of_record
from mtp_lightning.data.text.sources import SourceFile
from mtp_lightning.errors import DataError
from mtp_lightning.files.untrusted import shown

MOST_ROW_BYTES = 256 << 20  # of a line of JSON, or of a field of a table of text
MOST_FILE_BYTES = 2 << 30  # of a file that is one document
JSON_AS_TEXT = "JSON file without records, read as text"
PARQUET_DAMAGE = (OSError, ValueError, LookupError, MemoryError, NotImplementedError)
"""What pyarrow raises: most of its own are ValueErrors, a claim of too many bytes is a MemoryError."""

Row = bytes | dict[str, Any] | RowFault
"""A line of JSON, a record of a table, or why there is none."""

UNREAD_ENDINGS = r"\.(br|lzo|zz|z|deflate|sz|snappy)$"
"""Of compressions without a mark at their beginning."""

OF_A_ROW = re.compile(r", (line|record|row) [0-9]+$")
HINTS = {
    LFS_POINTER: "Fetch what it stands for: git lfs pull",
    UNMARKED: "Give its encoding: data.encoding=utf-16-le or utf-16-be (--encoding)",
    "tar": "Unpack it; or train on it as it is: data.kind=webdataset_stream",
    "Parquet": "Name it *.parquet, uncompressed",
    "Arrow": "Name it *.arrow, uncompressed",
    **dict.fromkeys(COMPRESSIONS, "Unpack it once: it is compressed twice"),
}


def document_of_file(file: SourceFile, reading: Reading) -> Document | LeftOut:
    """Read a whole file as one document: decompressed and in UTF-8 where it says what it is, else byte for byte.

    Left out is what is no text. That is a fault if the user named the file; but one of which nothing is known except
    that it has NUL bytes is then taken.

    Raises:
        DataError: what is compressed is damaged.
    """
    place = str(file.path)
    content: bytes | None = file.path.read_bytes() if file.num_bytes <= MOST_FILE_BYTES else None
    if content is not None and _is_wrapped(content, reading):
        try:
            with opened_text(io.BytesIO(content), file.name, reading.encoding) as stream:
                content = bounded(stream, MOST_FILE_BYTES)
        except DAMAGE as error:
            raise unreadable_file(file, error) from error
        except UnicodeDecodeError as error:
            return LeftOut(place=place, kind=f"invalid {error.encoding}", found=str(error))
    if content is None:
        return LeftOut(place=place, kind="too long", found=f"more than {MOST_FILE_BYTES:,} bytes in one document")
    kind = kind_of(content[:512]) or _unread_kind(file, content) or binary_kind(content)
    if kind and (kind != "binary" or not file.is_named or file.is_compressed):
        return _no_text(file, kind)
    return Document(name=file.name, parts=((content, True),))


def _is_wrapped(content: bytes, reading: Reading) -> bool:
    """Tell whether a file is compressed, or says its encoding, or has been given one."""
    return reading.encoding is not None or kind_of(content[:512]) in COMPRESSIONS or encoding_of(content[:4])[1] > 0


def _unread_kind(file: SourceFile, content: bytes) -> str | None:
    """Name a compression that is not read, and that only an ending tells."""
    ending = re.search(UNREAD_ENDINGS, file.name, re.IGNORECASE)
    if ending is None:
        return None
    try:
        content.decode()
    except UnicodeDecodeError:
        return f"content compressed as {ending[0]}"
    return None


def _no_text(file: SourceFile, kind: str) -> LeftOut:
    hint = HINTS.get(kind, "Make text of it, or leave it out")
    return LeftOut(
        place=str(file.path),
        kind=kind,
        found=f"{kind}, which is no text",
        hint=hint,
        is_fault=file.is_named or kind == LFS_POINTER,
    )


def documents_of_rows(
    file: SourceFile, rows: Iterable[Row], reading: Reading, *, first: int, unit: str, may_be_text: bool
) -> Iterator[Document | LeftOut]:
    """Yield a document for each row that is not blank.

    Args:
        file: where they come from.
        rows: the rows.
        reading: how they are read.
        first: number of the first.
        unit: what a row is called.
        may_be_text: whether a value that is no record makes the file a plain text.
    """
    for number, row in enumerate(rows, start=first):
        name = f"{file.name}:{number}"
        try:
            if isinstance(row, RowFault):
                raise row
            if isinstance(row, bytes) and not row.strip():
                continue
            yield document_of_record(json.loads(row) if isinstance(row, bytes) else row, name, reading)
        except (RowFault, ValueError, RecursionError) as error:  # the last for lists within lists
            if may_be_text and isinstance(row, bytes):
                yield LeftOut(place=str(file.path), kind=JSON_AS_TEXT, is_fault=False)
                yield document_of_file(file, reading)
            else:
                yield _bad_row(f"{file.path}, {unit} {number}", error)


def _bad_row(place: str, error: Exception) -> LeftOut:
    if isinstance(error, RowFault):
        return LeftOut(place=place, kind=error.kind, found=error.found, hint=error.hint)
    kinds = {RecursionError: "lists within lists, too deep", UnicodeDecodeError: "invalid UTF-8"}
    return LeftOut(place=place, kind=kinds.get(type(error), "damaged JSON"), found=str(error))


def documents_of_row_group(
    file: SourceFile, row_group: int, first_row: int, reading: Reading
) -> Iterator[Document | LeftOut]:
    """Yield a document for each row of a row group of a Parquet file.

    Raises:
        DataError: The file is damaged.
    """
    parquet = import_extra("pyarrow.parquet", f"read {file.name}")
    try:
        with parquet.ParquetFile(file.path) as table:
            wanted = wanted_columns(file, table.schema_arrow.names, reading)
            for batch in table.iter_batches(batch_size=1024, row_groups=[row_group], columns=wanted):
                rows = rows_of_batch(batch)
                yield from documents_of_rows(file, rows, reading, first=first_row, unit="row", may_be_text=False)
                first_row += len(rows)
    except PARQUET_DAMAGE as error:
        raise unreadable_file(file, error) from error


def wanted_columns(file: SourceFile, names: list[str], reading: Reading) -> list[str]:
    """Return the columns of a table that say documents.

    Raises:
        DataError: There are none, or two of one name.
    """
    wanted = reading.columns_of(names)
    if len(set(wanted)) < len(wanted):
        twice = next(name for name in wanted if wanted.count(name) > 1)
        found = f"{file.path}: {wanted.count(twice)} columns {shown(repr(twice))}"
        raise DataError("columns of a table must have names of their own", found, "Rename or remove all but one")
    if wanted:
        return wanted
    raise DataError(
        "a table must have a column 'text', a prompt and its completion, or 'messages'; or its columns be named",
        f"{file.path}: columns {shown(', '.join(names))}",
        f"Name the column: data.text_field={shown(names[0]) if names else 'NAME'} (--text-field)",
    )


def rows_of_batch(batch: Any) -> list[Row]:
    """Return the rows of some of Arrow's; one that is not UTF-8, or has a time beyond all calendars, as a fault."""
    try:
        rows: list[Row] = batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            kind = "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else "value out of range"
            return [RowFault(kind, str(error))]
        half = batch.num_rows // 2
        return rows_of_batch(batch.slice(0, half)) + rows_of_batch(batch.slice(half))
    return rows


def refused(left_out: LeftOut) -> DataError:
    """Return the error for what is no document."""
    hint = "Correct or remove the line, or leave out what is no document: data.on_bad_row=skip (--on-bad-row skip)"
    expected = (
        "every line of JSON and every row of a table must be an object with a string under 'text', with a prompt and "
        "its completion, or with a list of turns under 'messages'"
    )
    if not OF_A_ROW.search(left_out.place):
        expected, hint = "every file of a corpus must be text, JSON or a table", "Correct it, or leave it out"
    return DataError(expected, f"{left_out.place}: {left_out.found}", left_out.hint or hint)


def unreadable_file(file: SourceFile, error: Exception, place: str = "") -> DataError:
    """Return the error that a file of documents is damaged."""
    return DataError(
        f"{file.path} must be readable to its end",
        f"{type(error).__name__}: {error}{place}",
        "See to the rights of reading"
        if isinstance(error, PermissionError)
        else "Download the file again, or leave it out",
    )
