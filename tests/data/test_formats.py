"""Every format of text says the same documents, and chats teach what the assistant says."""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from mtp_lightning.data.sampling.windows import WindowDataset
from mtp_lightning.data.shards.verify import verify_shards
from mtp_lightning.data.text import blocks as units_module
from mtp_lightning.data.text.blocks import cut_into_blocks
from mtp_lightning.data.text.records import Document
from mtp_lightning.data.text.sources import find_files
from mtp_lightning.errors import DataError
from tests.data.corpora import END, build_tiny

RECORDS: list[dict[str, Any]] = [
    {"text": "plain é"},
    {"prompt": "ask", "completion": "answer"},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]},
    {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4"},
            {"role": "user", "content": "3+3?"},
            {"role": "assistant", "content": "6"},
        ]
    },
] * 30


ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    if path.suffix == ".parquet":
        keys = sorted({key for record in records for key in record})
        columns = {key: [record.get(key) for record in records] for key in keys}
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=7)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines, mtime=0))
    elif path.suffix == ".zst":
        path.write_bytes(
            b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (lines[:1000], lines[1000:]))
        )  # two frames
    else:
        path.write_bytes(lines)
    return path


def documents(path: Path) -> list[Document]:
    return [document for block in cut_into_blocks(find_files([str(path)])) for document in block.documents()]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.parquet"])
def test_formats_say_the_same_documents(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units_module, "BLOCK_BYTES", 300)
    path = write(tmp_path / name, RECORDS)
    blocks = list(cut_into_blocks(find_files([str(path)])))
    found = documents(path)
    assert len(blocks) > 5
    assert sum(block.num_bytes for block in blocks) == path.stat().st_size
    assert [document.name for document in found] == [f"{name}:{number}" for number in range(1, 121)]
    assert found[0].parts == (("plain é".encode(), True),)
    assert found[1].parts == ((b"ask", False), (b"answer", True))
    assert found[2].is_empty
    assert [document.parts for document in found] == [document.parts for document in found[:4]] * 30


def test_chat_teaches_the_turns_of_the_assistant_only(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", RECORDS[3:4] * 40)
    build_tiny([str(path)], tmp_path / "shards", member_tokens=1000)
    verify_shards(tmp_path / "shards")
    rows = WindowDataset(tmp_path / "shards", "train", seq_len=150, num_offsets=4)
    batch = rows.read(np.arange(len(rows)))
    tokens, mask = batch["tokens"].ravel(), batch["loss_mask"].ravel()
    text = bytes(np.where(tokens == END, 0, tokens).astype(np.uint8))
    assert text.startswith(b"<|user|>\n2+2?\n<|assistant|>\n4\n<|user|>\n3+3?\n<|assistant|>\n6\n\0<|user|>\n2+2?")
    learnt = bytes(np.where(tokens == END, 0, tokens)[mask].astype(np.uint8)[:200])
    assert set(learnt.split(b"\0")) >= {b"4\n6\n"}
    assert not set(learnt) - set(b"46\n\0")


@pytest.mark.parametrize(
    "messages", ["hi", [{"role": "user"}], [{"role": 1, "content": "x"}], ["hi"], {"role": "user", "content": 3}]
)
def test_chat_without_turns_is_refused_with_its_place(tmp_path: Path, messages: object) -> None:
    path = write(tmp_path / "x.jsonl", [{"text": "fine"}, {"messages": messages}])
    with pytest.raises(
        DataError, match=r"turns under 'messages'; found .*x\.jsonl, line 2: message 0 (is not an object|has no text)"
    ):
        documents(path)


def test_row_of_a_table_without_text_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", [{"text": "a"}] * 9 + [{"text": None}])
    with pytest.raises(DataError, match=r"x\.parquet, row 10: 'text' is null"):
        documents(path)


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.parquet"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    rng = np.random.default_rng(0)
    texts = [{"text": bytes(rng.integers(32, 127, 400, dtype=np.uint8)).decode()} for _ in range(200)]
    path = write(tmp_path / name, texts)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) // 2]
    elif name == "x.parquet":
        content[-40:] = bytes(40)  # pages carry no checksums; only what leads to them is checked
    else:
        content[len(content) // 3 : len(content) // 3 + 40] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r"must be readable to its end; found|must be an object with a string"
    ) as caught:
        assert documents(path) == "never"
    assert name in str(caught.value)


@pytest.mark.parametrize(("name", "library"), [("x.jsonl.zst", ZSTD), ("x.parquet", "pyarrow.parquet")])
def test_missing_library_is_named(tmp_path: Path, name: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / name, RECORDS[:1])
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DataError, match=rf"library {library} must be installed to read {name}.*pip install"):
        documents(path)
