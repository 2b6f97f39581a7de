"""Tables as spreadsheets write them, rows with NUL bytes, chats as bare lists, and files that are no text."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from mtp_lightning.data.text.blocks import cut_into_blocks
from mtp_lightning.data.text.records import Document, LeftOut, Reading
from mtp_lightning.data.text.sources import find_files
from mtp_lightning.errors import DataError

CHAT = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def read(path: Path, **options: Any) -> list[Document | LeftOut]:
    reading = Reading(**options)
    return [one for block in cut_into_blocks(find_files([str(path)]), reading) for one in block.documents(reading)]


def texts(path: Path, **options: Any) -> list[str]:
    return [one.text.decode() if isinstance(one, Document) else one.kind for one in read(path, **options)]


TABLES = {
    "columns without names": "text,,\na,,\nb,,\n",
    "an index": ",text\n0,a\n1,b\n",
    "delimiters in a quoted name": '"x, y";"text"\n1;a\n2;b\n',
    "a line break in a quoted name": '"x\ny";text\n1;a\n2;b\n',
    "a line for spreadsheets": "sep=|\r\nx|text\r\n1|a\r\n2|b\r\n",
    "blank lines first": "\r\n\r\ntext,x\r\na,1\r\nb,2\r\n",
    "rows filled up": "text,x\na,1,,\nb,2,,\n",
    "returns for line ends": "x;text\r1;a\r2;b\r",
}


@pytest.mark.parametrize("kind", TABLES)
def test_tables_as_spreadsheets_write_them_are_read(tmp_path: Path, kind: str) -> None:
    (tmp_path / "t.csv").write_bytes(TABLES[kind].encode())
    assert texts(tmp_path / "t.csv") == ["a", "b"]


@pytest.mark.parametrize("content", ['"text" and more,x\na,b\n', "text,text\na,b\n", ",,\na,b,c\n", '"text'])
def test_a_first_row_that_names_no_columns_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(DataError, match=r"t.csv must be readable.*(row of names|of one name|without its end)"):
        texts(tmp_path / "t.csv")


@pytest.mark.parametrize(("name", "begin", "row"), [("t.jsonl", "", '{{"text": "{}"}}\n'), ("t.csv", "text\n", "{}\n")])
def test_nul_bytes_spoil_only_their_row(tmp_path: Path, name: str, begin: str, row: str) -> None:
    """As after a crash, which leaves zeros where nothing was written."""
    (tmp_path / name).write_text(begin + row.format("a") + row.format("b\0") + row.format("c"))
    kinds = texts(tmp_path / name, on_bad_row="skip")
    assert [kinds[0], kinds[2]] == ["a", "c"]
    assert kinds[1] in ("damaged JSON", "NUL bytes")
    with pytest.raises(DataError, match=r"(line|row) [12]: "):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["t.jsonl", "t.json"])
def test_bare_lists_of_turns_are_chats(tmp_path: Path, name: str) -> None:
    chats = [json.dumps(CHAT), json.dumps(CHAT[::-1])]
    (tmp_path / name).write_text("\n".join(chats) if name == "t.jsonl" else f"[{','.join(chats)}]")
    found = read(tmp_path / name)
    assert [one.chat and one.chat.messages for one in found if isinstance(one, Document)] == [CHAT, CHAT[::-1]]


@pytest.mark.parametrize("given", [{"messages": []}, {"tools": 1}, {"self": 1}, {"add_generation_prompt": True}, "x"])
def test_what_a_row_may_not_tell_a_template_is_refused(tmp_path: Path, given: Any) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": CHAT, "chat_template_kwargs": given}))
    with pytest.raises(DataError, match=r"line 1: chat_template_kwargs .*Make it an object without messages"):
        texts(tmp_path / "t.jsonl")


WRITERS: dict[str, Callable[[pa.Table, str], None]] = {
    "t.parquet": pyarrow.parquet.write_table,
    "t.feather": pyarrow.feather.write_feather,
}


@pytest.mark.parametrize("name", WRITERS)
def test_columns_of_one_name_and_impossible_times_are_named(tmp_path: Path, name: str) -> None:
    texts_of = pa.array(["a", "b"])
    WRITERS[name](pa.Table.from_arrays([texts_of, texts_of], names=["text", "text"]), str(tmp_path / name))
    with pytest.raises(DataError, match=r"names of their own; found .*2 columns 'text'"):
        texts(tmp_path / name)
    late = pa.array([2**62, 0], pa.timestamp("s" if name == "t.feather" else "us"))
    WRITERS[name](pa.table({"text": texts_of, "at": late}), str(tmp_path / name))
    assert texts(tmp_path / name) == ["a", "b"]  # a column that is not needed
    kinds = texts(tmp_path / name, template="{text}{at}", on_bad_row="skip")
    assert kinds == ["value out of range", "no text under at"]


NO_TEXT = {
    "PNG": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    "JPEG": b"\xff\xd8\xff\xe0\0\x10JFIF",
    "RIFF": b"RIFF\x24\0\0\0WAVEfmt ",
    "MP4": b"\0\0\0\x18ftypmp42",
    "program": b"\x7fELF\2\1\1" + bytes(9),
    "GGUF": b"GGUF\3\0\0\0" + bytes(9),
    "safetensors": b'\x40\0\0\0\0\0\0\0{"__metadata__":{}}',
    "ORC": b"ORC\n\x06\x12\x04\x082P",
    "zlib": zlib.compress(b"a text of some length"),
    "content compressed as .br": b"\x8b\x0a\x80\xffa text",
}


@pytest.mark.parametrize("kind", NO_TEXT)
def test_images_models_and_programs_are_no_text(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.br"
    path.write_bytes(NO_TEXT[kind])
    with pytest.raises(DataError, match=rf"must be text, JSON or a table; found .*x.br: {kind}.*no text"):
        texts(path)
    path.write_text("a text, whatever its name")
    assert texts(path) == ["a text, whatever its name"]
