"""A corpus cut into blocks of documents of a few MiB, the same ones for any number of processes."""

import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from mtp_lightning.data.text.compressed import DAMAGE, opened_text
from mtp_lightning.data.text.documents import (
    HINTS,
    JSON_AS_TEXT,
    PARQUET_DAMAGE,
    Row,
    document_of_file,
    documents_of_row_group,
    documents_of_rows,
    refused,
    rows_of_batch,
    unreadable_file,
    wanted_columns,
)
from mtp_lightning.data.text.extras import import_extra
from mtp_lightning.data.text.kinds import BINARY, NUM_BYTES_SNIFFED, binary_kind, kind_of
from mtp_lightning.data.text.records import AS_KNOWN, Document, LeftOut, Reading, RowFault
from mtp_lightning.data.text.rows import json_rows, table_rows
from mtp_lightning.data.text.sources import SourceFile

BLOCK_BYTES = 4 << 20
JSON = (".json", ".jsonl", ".ndjson", ".jsonlines")
TABLES = (".csv", ".tsv")
PARQUET = (".parquet", ".pq")
ARROW = (".arrow", ".feather", ".ipc")


@dataclass(frozen=True, kw_only=True)
class DocumentBlock:
    """Some documents of one source: whole files, rows of one, or a row group of one."""

    source: int
    num_bytes: int  # of the files, as they lie on disk
    files: tuple[SourceFile, ...]
    rows: Any = None  # lines and records, or some of Arrow's
    row_group: int | None = None
    first: int = 1  # number of the first row
    unit: str = "row"
    may_be_text: bool = False  # if its one value is no record

    def documents(self, reading: Reading = AS_KNOWN) -> Iterator[Document | LeftOut]:
        """Yield the documents, and what is left out.

        Raises:
            DataError: One is malformed, and such are not to be left out; or a file is damaged.
        """
        for item in self._items(reading):
            if isinstance(item, LeftOut) and item.is_fault and reading.on_bad_row == "refuse":
                raise refused(item)
            yield item

    def _items(self, reading: Reading) -> Iterator[Document | LeftOut]:
        if self.row_group is not None:
            return documents_of_row_group(self.files[0], self.row_group, self.first, reading)
        if self.rows is None:
            return itertools.chain.from_iterable(
                _documents_of_file(file, reading, is_json=self.may_be_text) for file in self.files
            )
        rows = self.rows if isinstance(self.rows, list) else rows_of_batch(self.rows)
        return documents_of_rows(
            self.files[0], rows, reading, first=self.first, unit=self.unit, may_be_text=self.may_be_text
        )


def cut_into_blocks(files: list[SourceFile], reading: Reading = AS_KNOWN) -> Iterator[DocumentBlock]:
    """Cut a corpus: a block per few MiB of lines, values or rows of text, per row group of Parquet, else files.

    Rows of text are read here, so a block carries them; files and row groups are read where the block is worked on.

    Raises:
        DataError: A file is damaged, or the library that reads it is not installed.
    """
    together: list[SourceFile] = []
    num_bytes = 0
    for file in files:
        cut = _cutter(file)
        if together and (cut or num_bytes >= BLOCK_BYTES or together[0].source != file.source):
            yield _block_of_files(together)
            together, num_bytes = [], 0
        if cut:
            yield from cut(file, reading)
        else:
            together.append(file)
            num_bytes += file.num_bytes
    if together:
        yield _block_of_files(together)


def _cutter(file: SourceFile) -> Callable[[SourceFile, Reading], Iterator[DocumentBlock]] | None:
    form = file.format
    if form in JSON or form in TABLES:
        return _blocks_of_text
    if form not in (*PARQUET, *ARROW) or file.is_compressed:
        return None
    return _blocks_of_parquet if form in PARQUET else _blocks_of_arrow


def _block_of_files(files: list[SourceFile], *, may_be_text: bool = False) -> DocumentBlock:
    num_bytes = sum(file.num_bytes for file in files)
    return DocumentBlock(source=files[0].source, num_bytes=num_bytes, files=tuple(files), may_be_text=may_be_text)


def _documents_of_file(file: SourceFile, reading: Reading, *, is_json: bool) -> Iterator[Document | LeftOut]:
    if is_json and file.num_bytes:
        yield LeftOut(place=str(file.path), kind=JSON_AS_TEXT, is_fault=False)
    yield document_of_file(file, reading)


def _blocks_of_text(file: SourceFile, reading: Reading) -> Iterator[DocumentBlock]:
    """Cut a file of JSON or a table of text, compressed or not."""
    unit, number, first, size, done_bytes = "row", 0, 1, 0, 0
    batch: list[Row] = []
    may_be_text = file.format == ".json" and not file.is_named and not reading.names_fields
    try:
        with file.path.open("rb", buffering=0) as raw, opened_text(raw, file.name, reading.encoding) as stream:
            unit, rows = _rows_of(file, stream)
            for number, row in enumerate(rows, start=1):
                if size >= BLOCK_BYTES:
                    num_bytes, done_bytes = raw.tell() - done_bytes, raw.tell()
                    yield _block_of_rows(file, batch, unit, first, num_bytes)
                    batch, first, size = [], number, 0
                batch.append(row)
                size += _size_of(row)
    except (*DAMAGE, ValueError) as error:
        if may_be_text and not number:
            yield _block_of_files([file], may_be_text=True)
            return
        raise unreadable_file(file, error, f" (after {unit} {number:,})") from error
    if may_be_text and number == len(batch) and not any(_may_be_record(row) for row in batch):
        yield _block_of_files([file], may_be_text=True)
        return
    last = _block_of_rows(file, batch, unit, first, file.num_bytes - done_bytes)
    yield replace(last, may_be_text=may_be_text and number == 1)


def _may_be_record(row: Row) -> bool:
    return not isinstance(row, bytes) or row.lstrip().startswith(b"{")


def _rows_of(file: SourceFile, stream: io.BufferedReader) -> tuple[str, Iterator[Row]]:
    head = stream.peek(NUM_BYTES_SNIFFED)[:NUM_BYTES_SNIFFED]
    kind = kind_of(head) or binary_kind(head)
    if kind == BINARY and _begins_with_text(file, head):
        kind = None  # NUL bytes are faults of the rows that they are in
    if kind:
        return "line", iter([RowFault(kind, f"{kind}, which is no text", HINTS.get(kind, ""))])
    if file.format in TABLES:
        return "row", table_rows(stream, is_tsv=file.format == ".tsv")
    return json_rows(stream, is_jsonl=file.format != ".json")


def _begins_with_text(file: SourceFile, head: bytes) -> bool:
    """Tell whether a file begins with a record, or a row of names."""
    if file.format in TABLES:
        return b"\0" not in head.split(b"\n", 1)[0]
    return head.lstrip()[:1] in (b"{", b"[")


def _block_of_rows(file: SourceFile, rows: list[Row], unit: str, first: int, num_bytes: int) -> DocumentBlock:
    return DocumentBlock(source=file.source, num_bytes=num_bytes, files=(file,), rows=rows, unit=unit, first=first)


def _size_of(row: Row) -> int:
    if isinstance(row, bytes):
        return len(row)
    return sum(map(len, row.values())) if isinstance(row, dict) else 0


def _blocks_of_parquet(file: SourceFile, reading: Reading) -> Iterator[DocumentBlock]:
    parquet = import_extra("pyarrow.parquet", f"read {file.name}")
    try:
        with parquet.ParquetFile(file.path) as table:
            sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    except PARQUET_DAMAGE as error:
        raise unreadable_file(file, error, _what_it_is(file)) from error
    first, done_bytes = 1, 0
    for group, num_rows in enumerate(sizes):
        end_bytes = file.num_bytes * (first - 1 + num_rows) // max(1, sum(sizes))
        num_bytes, done_bytes = end_bytes - done_bytes, end_bytes
        yield DocumentBlock(source=file.source, num_bytes=num_bytes, files=(file,), row_group=group, first=first)
        first += num_rows


def _blocks_of_arrow(file: SourceFile, reading: Reading) -> Iterator[DocumentBlock]:
    """Cut a file of Arrow's, of either of its formats: `datasets` writes the one for streams."""
    arrow = import_extra("pyarrow", f"read {file.name}")
    first, done_bytes = 1, 0
    try:
        with arrow.memory_map(str(file.path)) as content:
            for batch in _arrow_batches(file, content, reading):
                step = max(1, batch.num_rows * BLOCK_BYTES // max(1, batch.nbytes))
                for begin in range(0, batch.num_rows, step):
                    rows = batch.slice(begin, step)
                    num_bytes, done_bytes = content.tell() - done_bytes, content.tell()
                    yield replace(_block_of_rows(file, [], "row", first, num_bytes), rows=rows)
                    first += rows.num_rows
    except PARQUET_DAMAGE as error:
        raise unreadable_file(file, error, f" (after row {first - 1:,}){_what_it_is(file)}") from error


def _arrow_batches(file: SourceFile, content: Any, reading: Reading) -> Iterator[Any]:
    """Yield batches of the columns that are needed, checked: what they hold is used as addresses."""
    ipc = import_extra("pyarrow.ipc", f"read {file.name}")
    is_file = content.read(6) == b"ARROW1"
    content.seek(0)
    table = (ipc.open_file if is_file else ipc.open_stream)(content)
    wanted = wanted_columns(file, table.schema.names, reading)
    batches = map(table.get_batch, range(table.num_record_batches)) if is_file else table
    for batch in batches:
        batch = batch.select(wanted)
        for column in batch.columns:
            _check(column)
        yield batch


def _check(column: Any) -> None:
    """Refuse a column whose numbers lead out of it; texts that are not UTF-8 are seen where they are read."""
    try:
        column.validate(full=True)
    except ValueError as error:
        if "UTF8" not in str(error) or column.type.num_fields:
            raise


def _what_it_is(file: SourceFile) -> str:
    """Say what a file is that its ending does not say."""
    with file.path.open("rb") as stream:
        kind = kind_of(stream.read(512))
    if kind in (None, "Parquet", "Arrow"):
        return ""
    return f"; it is {kind}: {HINTS.get(kind, 'make text or a table of it')}"
