"""Units of work: a corpus cut into pieces of a few MiB, the same ones for any number of processes."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from mtp_lightning.data.text.documents import (
    PARQUET_DAMAGE,
    Document,
    document_of_file,
    documents_of_lines,
    documents_of_row_group,
    unreadable_file,
)
from mtp_lightning.data.text.extras import import_extra
from mtp_lightning.data.text.sources import SourceFile
from mtp_lightning.data.text.zstd import open_zstd

UNIT_BYTES = 4 << 20
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Some documents of one source: whole files, lines of one, or a row group of one."""

    source: int
    num_bytes: int  # of the files, as they lie on disk
    files: tuple[SourceFile, ...]
    lines: list[bytes] | None = None
    row_group: int | None = None
    first: int = 1  # number of the first line or row

    def documents(self) -> Iterator[Document]:
        """Yield the documents.

        Raises:
            DataError: One is malformed.
        """
        if self.lines is not None:
            yield from documents_of_lines(self.files[0], self.first, self.lines)
        elif self.row_group is not None:
            yield from documents_of_row_group(self.files[0], self.row_group, self.first)
        else:
            yield from map(document_of_file, self.files)


def cut_into_units(files: list[SourceFile]) -> Iterator[Unit]:
    """Yield the units of a corpus: one per line block of `*.jsonl(.gz|.zst)`, per row group of `*.parquet`, else files.

    Lines are read here, so a unit carries them; files and row groups are read where the unit is worked on.

    Raises:
        DataError: A file is damaged, or the library that reads it is not installed.
    """
    together: list[SourceFile] = []
    for file in files:
        cut = _cutter(file)
        is_full = sum(other.num_bytes for other in together) >= UNIT_BYTES
        if together and (cut or is_full or together[0].source != file.source):
            yield _unit_of_files(together)
            together = []
        if cut:
            yield from cut(file)
        else:
            together.append(file)
    if together:
        yield _unit_of_files(together)


def _cutter(file: SourceFile) -> Callable[[SourceFile], Iterator[Unit]] | None:
    if file.path.name.endswith(LINES):
        return _units_of_lines
    return _units_of_parquet if file.path.suffix == ".parquet" else None


def _unit_of_files(files: list[SourceFile]) -> Unit:
    num_bytes = sum(file.num_bytes for file in files)
    return Unit(source=files[0].source, num_bytes=num_bytes, files=tuple(files))


def _units_of_lines(file: SourceFile) -> Iterator[Unit]:
    first = 1
    with file.path.open("rb") as raw, _decompressed(file, raw) as stream:
        read_bytes = 0
        while lines := _next_lines(file, stream):
            num_bytes, read_bytes = raw.tell() - read_bytes, raw.tell()
            yield Unit(source=file.source, num_bytes=num_bytes, files=(file,), lines=lines, first=first)
            first += len(lines)


def _next_lines(file: SourceFile, stream: BinaryIO) -> list[bytes]:
    try:
        return stream.readlines(UNIT_BYTES)
    except Exception as error:
        if isinstance(error, EOFError | gzip.BadGzipFile | zlib.error) or type(error).__name__ == "ZstdError":
            raise unreadable_file(file, error) from error
        raise


@contextmanager
def _decompressed(file: SourceFile, raw: BinaryIO) -> Iterator[BinaryIO]:
    if file.path.suffix == ".gz":
        with gzip.open(raw) as stream:
            yield stream  # type: ignore[misc]  # opened for reading bytes
    elif file.path.suffix == ".zst":
        yield open_zstd(raw, file.name)
    else:
        yield raw


def _units_of_parquet(file: SourceFile) -> Iterator[Unit]:
    parquet = import_extra("pyarrow.parquet", f"read {file.name}")
    try:
        with parquet.ParquetFile(file.path) as table:
            sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    except PARQUET_DAMAGE as error:
        raise unreadable_file(file, error) from error
    first, done_bytes = 1, 0
    for group, num_rows in enumerate(sizes):
        end_bytes = file.num_bytes * (first - 1 + num_rows) // max(1, sum(sizes))
        num_bytes, done_bytes = end_bytes - done_bytes, end_bytes
        yield Unit(source=file.source, num_bytes=num_bytes, files=(file,), row_group=group, first=first)
        first += num_rows
