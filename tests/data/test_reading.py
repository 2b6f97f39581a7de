"""Formats x compressions x odd contents: what is read is what others' writers have written; else it is named."""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from mtp_lightning.data.text import blocks, documents, rows
from mtp_lightning.data.text.blocks import cut_into_blocks
from mtp_lightning.data.text.records import Document, LeftOut, Reading
from mtp_lightning.data.text.sources import find_files
from mtp_lightning.errors import DataError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEXTS = [
    "plain",
    "é 地图 😀",
    'a "quoted", text',
    "two\nlines\r\nand more",
    "  blanks  ",
    "a,b;c\td|e",
    "[{",
    "x" * 3000,
]
RECORDS = [{"text": text, "id": number, "meta": {"lang": "de"}} for number, text in enumerate(TEXTS)]
LONG_WINDOW = {zstd.CompressionParameter.window_log: 30, zstd.CompressionParameter.enable_long_distance_matching: 1}


def long_window(content: bytes) -> bytes:
    compressor = zstd.ZstdCompressor(options=LONG_WINDOW)
    return compressor.compress(content) + compressor.flush()


def halves(compress: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    return lambda content: compress(content[: len(content) // 2]) + compress(content[len(content) // 2 :])


COMPRESSIONS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "none": ("", bytes),
    "gz": (".gz", gzip.compress),
    "GZ": (".GZ", gzip.compress),
    "gz of members": (".gz", halves(gzip.compress)),
    "bz2": (".bz2", bz2.compress),
    "bz2 of streams": (".bz2", halves(bz2.compress)),
    "xz": (".xz", lzma.compress),
    "xz of streams": (".xz", lambda content: lzma.compress(content[:99]) + bytes(8) + lzma.compress(content[99:])),
    "zst": (".zst", zstd.compress),
    "zst of frames": (".zst", halves(zstd.compress)),
    "zst after a frame to skip": (".zst", lambda content: b"\x50\x2a\x4d\x18\4\0\0\0skip" + zstd.compress(content)),
    "zst of a long window": (".zstd", long_window),
    "gz that was unpacked on its way": (".gz", bytes),
    "gzip under no ending": ("", gzip.compress),
}


def json_lines(records: list[dict[str, Any]], **options: Any) -> bytes:
    return "".join(json.dumps(record, **options) + "\n" for record in records).encode()


def table(records: list[dict[str, Any]], **options: Any) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["id", "text"], extrasaction="ignore", **options)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


TEXT_FORMATS: dict[str, tuple[str, Callable[[list[dict[str, Any]]], bytes]]] = {
    "lines": ("x.jsonl", json_lines),
    "lines as .json": ("x.json", json_lines),
    "ndjson": ("x.ndjson", lambda r: json_lines(r, ensure_ascii=False)),
    "capitals": ("X.JSONL", json_lines),
    "no last line break": ("x.jsonl", lambda r: json_lines(r)[:-1]),
    "CRLF": ("x.jsonl", lambda r: json_lines(r).replace(b"\n", b"\r\n")),
    "array": ("x.json", lambda r: json.dumps(r).encode()),
    "array in .jsonl": ("x.jsonl", lambda r: json.dumps(r).encode()),
    "array, a record a line": ("x.json", lambda r: b"[\n" + b",\n".join(json.dumps(x).encode() for x in r) + b"\n]\n"),
    "pretty array": ("x.json", lambda r: json.dumps(r, indent=2, ensure_ascii=False).encode()),
    "pretty values": ("x.json", lambda r: b"\n".join(json.dumps(x, indent=4).encode() for x in r)),
    "byte-order mark": ("x.json", lambda r: codecs.BOM_UTF8 + json.dumps(r).encode()),
    "UTF-16": ("x.jsonl", lambda r: json_lines(r, ensure_ascii=False).decode().encode("utf-16")),
    "UTF-32": ("x.json", lambda r: json.dumps(r).encode("utf-32")),
    "csv": ("x.csv", table),
    "csv with a byte-order mark": ("x.csv", lambda r: codecs.BOM_UTF8 + table(r)),
    "csv of semicolons": ("x.csv", lambda r: table(r, delimiter=";")),
    "tsv": ("x.TSV", lambda r: table(r, delimiter="\t", lineterminator="\n")),
}


def found(path: Path, reading: Reading | None = None) -> list[Document | LeftOut]:
    reading = reading or Reading()
    return [one for block in cut_into_blocks(find_files([str(path)]), reading) for one in block.documents(reading)]


def texts(path: Path, reading: Reading | None = None) -> list[str]:
    return [one.text.decode() if isinstance(one, Document) else one.kind for one in found(path, reading)]


PAIRS = [
    (form, compression)
    for form in TEXT_FORMATS
    for compression in COMPRESSIONS
    if form in ("lines", "pretty array", "csv") or compression in ("none", "zst of frames")
]


@pytest.mark.parametrize(("form", "compression"), PAIRS)
def test_every_format_is_read_as_it_was_written(
    tmp_path: Path, form: str, compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 700)
    (name, write), (ending, compress) = TEXT_FORMATS[form], COMPRESSIONS[compression]
    path = tmp_path / f"{name}{ending}"
    path.write_bytes(compress(write(RECORDS)))
    assert texts(path) == TEXTS
    assert texts(tmp_path) == TEXTS
    reading = Reading(template="{id}: {text}")
    assert texts(path, reading) == [f"{number}: {text}" for number, text in enumerate(TEXTS)]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_text_is_one_document_whatever_its_wrapping(tmp_path: Path, encoding: str, compression: str) -> None:
    ending, compress = COMPRESSIONS[compression]
    text = "".join(TEXTS)
    (tmp_path / f"notes.txt{ending}").write_bytes(compress(text.encode(encoding)))
    assert texts(tmp_path) == [text]


COLUMNS: dict[str, pa.Array] = {
    "string": pa.array(TEXTS),
    "large_string": pa.array(TEXTS, pa.large_string()),
    "string_view": pa.array(TEXTS, pa.string_view()),
    "binary": pa.array([text.encode() for text in TEXTS], pa.binary()),
    "dictionary": pa.array(TEXTS * 2).dictionary_encode().slice(0, len(TEXTS)),
}


def write_table(path: Path, table: pa.Table) -> None:
    match path.name:
        case "x.parquet" | "X.PARQUET":
            pa.parquet.write_table(table, path, row_group_size=3)
        case "stream.arrow":
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=3)
        case "file.arrow":
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table, max_chunksize=3)
        case _:
            pa.feather.write_feather(table, path, compression="lz4")


@pytest.mark.parametrize("name", ["x.parquet", "X.PARQUET", "stream.arrow", "file.arrow", "x.feather"])
@pytest.mark.parametrize("column", COLUMNS)
def test_every_type_of_text_in_a_table_is_read(
    tmp_path: Path, name: str, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)
    struct = pa.array([{"lang": "de", "body": text} for text in TEXTS])
    write_table(tmp_path / name, pa.table({"id": range(len(TEXTS)), "text": COLUMNS[column], "meta": struct}))
    assert texts(tmp_path / name) == TEXTS
    assert texts(tmp_path / name, Reading(text_field="meta.body")) == TEXTS
    assert [one.name for one in found(tmp_path) if isinstance(one, Document)] == [f"{name}:{n}" for n in range(1, 9)]


@pytest.mark.parametrize("name", ["x.parquet", "stream.arrow", "file.arrow"])
def test_rows_of_a_table_that_are_no_text_are_counted(tmp_path: Path, name: str) -> None:
    broken = pa.array([b"a", None, b"\xff\xfe", b"b"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 4, broken.buffers())
    write_table(tmp_path / name, pa.table({"text": column}))
    assert texts(tmp_path / name, Reading(on_bad_row="skip")) == ["a", "no text under text", "invalid UTF-8", "b"]
    with pytest.raises(DataError, match=rf"{name}, row 2: 'text' is null"):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["stream.arrow", "file.arrow"])
def test_texts_that_lead_out_of_their_table_are_refused(tmp_path: Path, name: str) -> None:
    write_table(tmp_path / name, pa.table({"text": ["x" * 7777, "abc"]}))
    content, offsets = (tmp_path / name).read_bytes(), struct.pack("<3i", 0, 7777, 7780)
    assert content.count(offsets) == 1
    (tmp_path / name).write_bytes(content.replace(offsets, struct.pack("<3i", 0, 7777, 2**20)))
    with pytest.raises(DataError, match=rf"{name} must be readable to its end; found ArrowInvalid"):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["x.csv", "x.arrow", "x.jsonl"])
def test_blocks_cross_process_borders(tmp_path: Path, name: str) -> None:
    contents = {"x.csv": b"text\na\nb,c\n", "x.jsonl": b'{"text": "a"}\n{\n'}
    if name in contents:
        (tmp_path / name).write_bytes(contents[name])
    else:
        pa.feather.write_feather(pa.table({"text": ["a", None]}), tmp_path / name)
    reading = Reading(on_bad_row="skip")
    (block,) = cut_into_blocks(find_files([str(tmp_path / name)]), reading)
    there: list[Document | LeftOut] = list(pickle.loads(pickle.dumps(block)).documents(reading))
    assert there == list(block.documents(reading))
    assert [type(one) for one in there] == [Document, LeftOut]


def test_what_datasets_saves_and_reads_is_read_as_it_reads_it(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    made = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict(train=made, test=made).save_to_disk(str(tmp_path / "saved"))
    assert texts(tmp_path / "saved") == TEXTS * 2
    assert texts(tmp_path / "saved" / "train") == TEXTS
    for number, (form, builder) in enumerate(
        {"lines": "json", "pretty array": "json", "ndjson": "json", "csv": "csv"}.items()
    ):
        name, write = TEXT_FORMATS[form]
        path = tmp_path / f"{number}{name}.gz"
        path.write_bytes(gzip.compress(write(RECORDS)))
        read = datasets.load_dataset(builder, data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
        assert texts(path) == list(read["text"])


DAMAGED: dict[str, tuple[str, bytes, str]] = {
    "gzip cut": ("x.jsonl.gz", gzip.compress(json_lines(RECORDS * 99))[:-200], r"EOFError.*\(after line [1-9]\d+\)"),
    "gzip cut in its sum": ("x.txt.gz", gzip.compress(b"text")[:-3], "EOFError"),
    "bzip2 cut": ("x.jsonl.bz2", bz2.compress(json_lines(RECORDS))[:-9], "EOFError: the compressed content is cut"),
    "xz cut": ("x.jsonl.xz", lzma.compress(json_lines(RECORDS))[:-9], "EOFError: the compressed content is cut"),
    "zstd cut": ("x.csv.zst", zstd.compress(table(RECORDS))[:-9], "EOFError: the compressed content is cut"),
    "zstd cut at a frame": ("x.txt.zst", zstd.compress(b"a") + zstd.compress(b"b")[:-2], "EOFError"),
    "bzip2 and garbage": ("x.txt.bz2", bz2.compress(b"text") + b"garbage", "OSError"),
    "xz and a damaged stream": ("x.txt.xz", lzma.compress(b"a") + b"\xfd7zXZ\0" + b"x" * 30, "OSError"),
    "array without end": ("x.json", b'[{"text": "a"}, {"text": "b"}', r"an array without its end \(after record 2\)"),
    "array cut in a value": ("x.json", b'[{"text": "a"}, {"text": "b', r"Unterminated string .*\(after record 1\)"),
    "array of fragments": ("x.json", b'[{"text": "a"} {"text": "b"}]', r"'\{' between two values"),
    "array and more": ("x.json", b'[{"text": "a"}] x', "something after the end"),
    "deep array": ("x.json", b"[" * 200_000, "too deep"),
    "quote without end": ("x.csv", b'text\n"a\nb\nc\n', "a quoted field without its end"),
    "names twice": ("x.csv", b"text,text\na,b\n", "two columns of one name"),
    "nothing in a table": ("x.csv", b"", "two columns of one name, or none"),
    "no Parquet": ("x.parquet", b"<html>not found</html>", "Parquet magic bytes"),
    "a pointer": ("x.parquet", b"version https://git-lfs.github.com/spec/v1\n", "it is Git LFS pointer: Fetch"),
    "no Arrow": ("x.arrow", b"nothing of Arrow's", "Arrow"),
    "empty Arrow": ("x.arrow", b"", "Arrow|Tried reading|empty"),
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("on_bad_row", ["refuse", "skip"])
def test_damage_is_named_with_its_place_and_never_skipped(tmp_path: Path, damage: str, on_bad_row: Any) -> None:
    name, content, said = DAMAGED[damage]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} must be readable to its end; found .*{said}"):
        texts(tmp_path / name, Reading(on_bad_row=on_bad_row))


def archive(make: Callable[[io.BytesIO], Any]) -> bytes:
    content = io.BytesIO()
    make(content)
    return content.getvalue()


def tar(content: io.BytesIO) -> None:
    with tarfile.open(fileobj=content, mode="w") as made:
        made.addfile(tarfile.TarInfo("a.txt"))


NO_TEXT: dict[str, tuple[str, bytes, str, str]] = {
    "zip": ("x.txt", archive(lambda c: zipfile.ZipFile(c, "w").writestr("a", "b")), "zip", "Make text of it"),
    "tar": ("x.tar.gz", gzip.compress(archive(tar)), "tar", "Unpack it; or .*webdataset_stream"),
    "7z": ("x.7z", b"7z\xbc\xaf\x27\x1c" + bytes(9), "7z", "Make text of it"),
    "lz4": ("x.txt.lz4", b"\x04\x22\x4d\x18" + bytes(9), "lz4", "Make text of it"),
    "PDF": ("x.pdf", b"%PDF-1.7\n...", "PDF", "Make text of it"),
    "twice": ("x.txt.gz", gzip.compress(gzip.compress(b"text")), "gzip", "compressed twice"),
    "Parquet": ("x.txt", b"PAR1....", "Parquet", r"Name it \*\.parquet"),
    "packed Parquet": ("x.parquet.gz", gzip.compress(b"PAR1...."), "Parquet", r"Name it \*\.parquet, uncompressed"),
    "unmarked": ("x.txt", "a text of some length".encode("utf-16-be"), "UTF-16 without", "--encoding"),
    "not gzip": ("x.txt.gz", b"\0\1\2\3" * 9, "binary", "Make text of it"),
}


@pytest.mark.parametrize("kind", NO_TEXT)
def test_what_is_no_text_is_named_and_in_a_folder_left_out(tmp_path: Path, kind: str) -> None:
    name, content, said, hint = NO_TEXT[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"must be text, JSON or a table; found .*{name}: {said}.*{hint}"):
        texts(tmp_path / name)
    assert [one[: len(said)] for one in texts(tmp_path)] == [said]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.tsv.gz"])
@pytest.mark.parametrize("kind", ["zip", "7z", "PDF", "Parquet", "unmarked", "not gzip"])
def test_lines_and_tables_that_are_something_else_are_named(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(NO_TEXT[kind][1])
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=rf"{name}, line 1: {NO_TEXT[kind][2]}.*, which is no text"):
            texts(path)
    assert texts(tmp_path, Reading(on_bad_row="skip"))[0].startswith(NO_TEXT[kind][2])


def test_a_pointer_in_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(DataError, match="Git LFS pointer.* git lfs pull"):
        texts(tmp_path)


def test_an_encoding_is_read_where_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes("地图".encode("utf-16"))  # its mark comes first
    (tmp_path / "c.jsonl").write_bytes('{"text": "é"}\n'.encode("latin-1"))
    assert texts(tmp_path, Reading(encoding="latin-1")) == ["café", "地图", "é"]
    (tmp_path / "a.txt").write_bytes(b"\x81")
    with pytest.raises(DataError, match="'shift_jis' codec can't decode"):
        texts(tmp_path / "a.txt", Reading(encoding="shift_jis"))


def test_json_of_a_program_is_text_in_a_folder_and_refused_by_name(tmp_path: Path) -> None:
    contents = ['{\n  "name": "x",\n  "n": {"a": []}\n}\n', '{"a": 1}', "[1, 2]", "{\n // a comment\n}\n", "3", ""]
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.json"
        path.write_text(content)
        if content:
            with pytest.raises(DataError):
                texts(path)
    noted = [one for content in contents if content for one in (documents.JSON_AS_TEXT, content)]
    noted += [""]
    assert texts(tmp_path) == noted
    with pytest.raises(DataError):
        texts(tmp_path, Reading(text_field="body"))


def test_memory_is_bounded_by_a_limit_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rows, documents):
        monkeypatch.setattr(module, "MOST_ROW_BYTES", 2000)
    monkeypatch.setattr(rows, "READ_BYTES", 64)
    (tmp_path / "x.jsonl").write_bytes(json_lines(RECORDS + RECORDS[:1]))
    assert texts(tmp_path / "x.jsonl", Reading(on_bad_row="skip")) == [*TEXTS[:-1], "too long", TEXTS[0]]
    with pytest.raises(DataError, match=r"x\.jsonl, line 8: a line of more than 2,000 bytes"):
        texts(tmp_path / "x.jsonl")
    for name, content in (("x.json", json.dumps(RECORDS).encode()), ("x.csv", table(RECORDS))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"more than 2,000 characters.* \(after (record|row) 7\)"):
            texts(tmp_path / name)
    monkeypatch.setattr(documents, "MOST_FILE_BYTES", 2000)
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"x" * 3_000_000))
    with pytest.raises(DataError, match="more than 2,000 bytes in one document"):
        texts(tmp_path / "x.txt.gz")


@pytest.mark.parametrize("source", ["", " ", "a\0b", "a" * 300, "a/" * 3000, "~nobody-of-this-name/x", "a\ud800"])
def test_names_that_the_system_refuses_are_told(source: str) -> None:
    with pytest.raises(DataError, match=r"every entry of data\.corpus must"):
        find_files([source])


def test_what_is_no_file_is_told_or_counted(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "again").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / ".hidden").touch()
    with pytest.raises(DataError, match="is a pipe, a socket or a device"):
        find_files([str(tmp_path / "pipe")])
    with pytest.raises(DataError, match="no file or folder"):
        find_files([str(tmp_path / "loop")])
    with pytest.raises(DataError, match=r"yields none in .*, but 1 hidden.*1 links to folders"):
        find_files([str(tmp_path)])
    (tmp_path / "a.txt").write_text("x")
    passed_over = Counter[str]()
    assert [file.name for file in find_files([str(tmp_path)], passed_over)] == ["a.txt"]
    assert passed_over == {
        "hidden": 1,
        "links to folders": 1,
        "links to nothing": 1,
        "pipes, sockets or devices": 1,
    }
