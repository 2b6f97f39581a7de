"""Adopted folders against the libraries that write and read them, where these are installed."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtp_lightning.data.shards.manifest import load_manifest
from mtp_lightning.data.shards.mapped import ShardMaps
from tests.data.foreign import Document, some_documents
from tests.data.test_adopt import adopted, documents_of

BLOCK_TOKENS = 16
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "int64"])
def test_what_megatron_writes_and_reads_is_what_is_read(tmp_path: Path, dtype: str) -> None:
    megatron: Any = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is missing")
    documents = some_documents()
    _write_with_megatron(megatron, tmp_path / "x", documents, dtype)
    adopted(tmp_path / "x", tmp_path / "ours")
    theirs = megatron.IndexedDataset(str(tmp_path / "x/part"), mmap=True)
    bounds = theirs.document_indices
    by_them = [
        np.concatenate([theirs[sequence] for sequence in range(first, last)]).tolist()
        for first, last in itertools.pairwise(bounds)
    ]
    assert documents_of(tmp_path / "ours") == by_them == [own.tolist() for own in documents]


@pytest.mark.parametrize("dtype", ["torch.int32", "torch.int64", "torch.uint16", "numpy.uint16", "numpy.uint32"])
def test_what_litdata_writes_and_reads_is_what_is_read(tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("litdata", reason="litdata is missing")
    from litdata import StreamingDataset
    from litdata.streaming.item_loader import TokensLoader

    documents = some_documents()
    _write_with_litdata(tmp_path / "x", documents, dtype)
    adopted(tmp_path / "x", tmp_path / "ours", member_tokens=1 << 20)
    assert documents_of(tmp_path / "ours") == [own.tolist() for own in documents]
    blocks = StreamingDataset(str(tmp_path / "x"), item_loader=TokensLoader(block_size=BLOCK_TOKENS), shuffle=False)
    flat = _tokens_by_file(tmp_path / "ours")
    by_us = [
        own[begin : begin + BLOCK_TOKENS]
        for own in flat
        for begin in range(0, own.size - BLOCK_TOKENS + 1, BLOCK_TOKENS)
    ]
    by_them = [np.asarray(blocks[number]) for number in range(len(blocks))]
    assert len(by_them) > 50
    assert np.array_equal(by_us, by_them)


def _tokens_by_file(folder: Path) -> list[Any]:
    names = list(dict.fromkeys(shard.name for shard in load_manifest(folder).shards))
    found: dict[str, list[Any]] = {name: [] for name in names}
    for split in ("train", "validation"):
        maps = ShardMaps(folder, split)
        for place, shard in enumerate(maps.shards):
            found[shard.name].append(maps[place].tokens(np.array([0]), shard.num_tokens)[0])
    return [np.concatenate(own) for own in found.values()]


def _write_with_megatron(megatron: Any, folder: Path, documents: list[Document], dtype: str) -> None:
    folder.mkdir()
    builder = megatron.IndexedDatasetBuilder(str(folder / "part.bin"), dtype=getattr(np, dtype))
    for own in documents:
        lengths = [10, own.size - 10] if own.size > 20 else [own.size]
        builder.add_document(torch.from_numpy(own), lengths)
    builder.finalize(str(folder / "part.idx"))


def _write_with_litdata(folder: Path, documents: list[Document], dtype: str) -> None:
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes="2KB", item_loader=TokensLoader(block_size=BLOCK_TOKENS))
    library, _, name = dtype.partition(".")
    for number, own in enumerate(documents):
        array = own.astype(name)
        writer[number] = torch.from_numpy(array) if library == "torch" else array
    writer.done()
    writer.merge()
