"""Documents: what a file, a line or a row of a table says, and which parts of it are learnt."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mtp_lightning.data.text.chats import FIELDS, Chat, chat_of_record
from mtp_lightning.data.text.extras import import_extra
from mtp_lightning.data.text.sources import SourceFile
from mtp_lightning.errors import DataError
from mtp_lightning.files.untrusted import shown

NUM_BYTES_SNIFFED = 8192
COLUMNS = ("text", "prompt", "completion", *FIELDS)
PARQUET_DAMAGE = (OSError, ValueError, LookupError, MemoryError, NotImplementedError)
"""What pyarrow raises: most of its own are ValueErrors, a claim of too many bytes is a MemoryError."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """One piece of text that predicts nothing beyond its own end."""

    name: str
    parts: tuple[tuple[bytes, bool], ...]  # texts in their order, and whether each is learnt or only read
    is_binary: bool = False
    chat: Chat | None = None  # of which a template makes the parts

    @property
    def text(self) -> bytes:
        """All of the text."""
        return b"".join(text for text, _ in self.parts)

    @property
    def is_empty(self) -> bool:
        """Tell whether there is nothing to learn in it."""
        return not any(text for text, is_learnt in self.parts if is_learnt)


def document_of_file(file: SourceFile) -> Document:
    """Read a whole file as one document, byte for byte.

    A file that has a NUL byte near its beginning is marked as binary, for the caller to leave out, unless the user
    named it.
    """
    text = file.path.read_bytes()
    is_binary = not file.is_named and b"\0" in text[:NUM_BYTES_SNIFFED]
    return Document(name=file.name, parts=((text, True),), is_binary=is_binary)


def documents_of_lines(file: SourceFile, first_line: int, lines: list[bytes]) -> Iterator[Document]:
    """Yield a document for each line of JSON that is not blank.

    Raises:
        DataError: A line is not an object that says a document (see `parts_of_record`).
    """
    for number, line in enumerate(lines, start=first_line):
        if line.strip():
            place = f"{file.path}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # the latter for lists within lists
                raise _unreadable(f"{place}: {error}") from error
            yield document_of_record(record, f"{file.name}:{number}", place)


def documents_of_row_group(file: SourceFile, row_group: int, first_row: int) -> Iterator[Document]:
    """Yield a document for each row of a row group of a Parquet file.

    Raises:
        DataError: The file is damaged, or a row does not say a document (see `parts_of_record`).
    """
    parquet = import_extra("pyarrow.parquet", f"read {file.name}")
    number = first_row
    try:
        with parquet.ParquetFile(file.path) as table:
            wanted = [name for name in table.schema_arrow.names if name in COLUMNS]
            for batch in table.iter_batches(batch_size=1024, row_groups=[row_group], columns=wanted or None):
                for record in batch.to_pylist():
                    place = f"{file.path}, row {number}"
                    record = {key: value for key, value in record.items() if value is not None}
                    yield document_of_record(record, f"{file.name}:{number}", place)
                    number += 1
    except PARQUET_DAMAGE as error:
        raise unreadable_file(file, error) from error


def document_of_record(record: Any, name: str, place: str) -> Document:
    """Return the document of a row: its `text`, its `prompt` and `completion`, or a chat (see `chat_of_record`).

    Raises:
        DataError: It is none of these; the error names the place.
    """
    if not isinstance(record, dict):
        raise _unreadable(f"{place}: a {_kind(record)}")
    if chat := chat_of_record(record, place):
        return Document(name=name, parts=(), chat=chat)
    return Document(name=name, parts=parts_of_record(record, place))


def parts_of_record(record: dict[str, Any], place: str) -> tuple[tuple[bytes, bool], ...]:
    """Return the parts of a document from `text`, or from `prompt` and `completion`.

    >>> parts_of_record({"prompt": "2+2=", "completion": "4"}, "")
    ((b'2+2=', False), (b'4', True))

    Raises:
        DataError: It is neither; the error names the place.
    """
    keys = ("prompt", "completion") if "completion" in record else ("text",)
    for key in keys:
        if not isinstance(record.get(key), str):
            found = f"{key!r} is a {_kind(record[key])}" if key in record else f"keys {shown(sorted(record))}"
            raise _unreadable(f"{place}: {found}")
    return tuple((_bytes(record[key]), key != "prompt") for key in keys)


def unreadable_file(file: SourceFile, error: Exception) -> DataError:
    """Return the error that a file of documents is damaged."""
    return DataError(
        f"{file.path} must be readable to its end",
        f"{type(error).__name__}: {error}",
        "Download the file again, or leave it out",
    )


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _kind(value: Any) -> str:
    return type(value).__name__


def _unreadable(found: str) -> DataError:
    return DataError(
        "every line of JSONL and every row of Parquet must be an object with a string under 'text', "
        "with strings under 'prompt' and 'completion', or with a list of turns under 'messages'",
        found,
        "Correct or remove the line",
    )
