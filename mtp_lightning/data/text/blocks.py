"""A corpus cut into blocks of documents of a few MiB, the same ones for any number of processes."""

import gzip
import io
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

BLOCK_BYTES = 4 << 20
READ_BYTES = 1 << 20
LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True, kw_only=True)
class DocumentBlock:
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


def cut_into_blocks(files: list[SourceFile]) -> Iterator[DocumentBlock]:
    """Cut a corpus: a block per few MiB of lines of `*.jsonl(.gz|.zst)`, per row group of `*.parquet`, else files.

    Lines are read here, so a block carries them; files and row groups are read where the block is worked on.

    Raises:
        DataError: A file is damaged, or the library that reads it is not installed.
    """
    together: list[SourceFile] = []
    for file in files:
        cut = _cutter(file)
        is_full = sum(other.num_bytes for other in together) >= BLOCK_BYTES
        if together and (cut or is_full or together[0].source != file.source):
            yield _block_of_files(together)
            together = []
        if cut:
            yield from cut(file)
        else:
            together.append(file)
    if together:
        yield _block_of_files(together)


def _cutter(file: SourceFile) -> Callable[[SourceFile], Iterator[DocumentBlock]] | None:
    if file.path.name.endswith(LINES):
        return _blocks_of_lines
    return _blocks_of_parquet if file.path.suffix == ".parquet" else None


def _block_of_files(files: list[SourceFile]) -> DocumentBlock:
    num_bytes = sum(file.num_bytes for file in files)
    return DocumentBlock(source=files[0].source, num_bytes=num_bytes, files=tuple(files))


def _blocks_of_lines(file: SourceFile) -> Iterator[DocumentBlock]:
    first = 1
    with file.path.open("rb") as raw, _decompressed(file, raw) as stream:
        read_bytes = 0
        while lines := _next_lines(file, stream):
            num_bytes, read_bytes = raw.tell() - read_bytes, raw.tell()
            yield DocumentBlock(source=file.source, num_bytes=num_bytes, files=(file,), lines=lines, first=first)
            first += len(lines)


def _next_lines(file: SourceFile, stream: BinaryIO) -> list[bytes]:
    try:
        return stream.readlines(BLOCK_BYTES)
    except (EOFError, OSError, zlib.error) as error:  # pyarrow reports what is wrong with zstd as an OSError
        raise unreadable_file(file, error) from error


@contextmanager
def _decompressed(file: SourceFile, raw: BinaryIO) -> Iterator[BinaryIO]:
    if file.path.suffix == ".gz":
        with gzip.open(raw) as stream:
            yield stream  # type: ignore[misc]  # opened for reading bytes
    elif file.path.suffix == ".zst":
        library = import_extra("pyarrow", f"read {file.name}")
        yield io.BufferedReader(library.input_stream(raw, compression="zstd"), READ_BYTES)
    else:
        yield raw


def _blocks_of_parquet(file: SourceFile) -> Iterator[DocumentBlock]:
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
        yield DocumentBlock(source=file.source, num_bytes=num_bytes, files=(file,), row_group=group, first=first)
        first += num_rows
