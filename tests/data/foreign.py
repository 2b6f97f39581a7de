"""Folders of tokens in the formats of others, written by what they publish, with numpy alone."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Document = NDArray[np.int64]
MEGATRON_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}
LITDATA_FORMATS = {
    "uint16": "no_header_numpy:5",
    "uint32": "no_header_numpy:6",
    "int32": "no_header_tensor:16",
    "int64": "no_header_tensor:18",
}


def some_documents(*, num_documents: int = 60, seed: int = 0, most: int = 256) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(0, most, rng.integers(1, 60)), most) for _ in range(num_documents)]


def write_megatron(folder: Path, documents: list[Document], dtype: str, *, name: str = "part_text_document") -> Path:
    """Write NAME.bin and NAME.idx; documents of more than 20 tokens are two sequences."""
    folder.mkdir(parents=True, exist_ok=True)
    sequences = [part for own in documents for part in ([own[:10], own[10:]] if own.size > 20 else [own])]
    bounds = np.cumsum([0, *(2 if own.size > 20 else 1 for own in documents)])
    lengths = np.array([own.size for own in sequences])
    places = (np.cumsum(lengths) - lengths) * np.dtype(dtype).itemsize
    (folder / f"{name}.bin").write_bytes(np.concatenate(sequences).astype(dtype).tobytes())
    write_index(folder / f"{name}.idx", MEGATRON_CODES[dtype], lengths, places, bounds)
    return folder


def write_index(path: Path, code: int, lengths: Any, places: Any, bounds: Any, *, version: int = 1) -> None:
    head = b"MMIDIDX\0\0" + np.uint64(version).tobytes() + np.uint8(code).tobytes()
    counts = np.uint64(len(lengths)).tobytes() + np.uint64(len(bounds)).tobytes()
    arrays = [np.array(lengths, "<i4"), np.array(places, "<i8"), np.array(bounds, "<i8")]
    path.write_bytes(head + counts + b"".join(array.tobytes() for array in arrays))


def write_litdata(folder: Path, documents: list[Document], dtype: str, *, chunk_documents: int = 25) -> Path:
    """Write chunks and index.json; chunk 10 comes after chunk 9 there, not by its name."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks = []
    for number, at in enumerate(range(0, len(documents), chunk_documents)):
        items = [own.astype(dtype).tobytes() for own in documents[at : at + chunk_documents]]
        places = np.cumsum([0, *map(len, items)]) + 4 * (len(items) + 2)
        content = np.array([len(items), *places], "<u4").tobytes() + b"".join(items)
        name = f"chunk-0-{number}.bin"
        (folder / name).write_bytes(content)
        dim = sum(own.size for own in documents[at : at + chunk_documents])
        chunks.append({"chunk_bytes": len(content), "chunk_size": len(items), "dim": dim, "filename": name})
    config = {"compression": None, "data_format": [LITDATA_FORMATS[dtype]], "encryption": None, "chunk_size": None}
    (folder / "index.json").write_text(
        json.dumps({"chunks": chunks, "config": {**config, "item_loader": "TokensLoader"}})
    )
    return folder


def write_raw(folder: Path, documents: list[Document], dtype: str, *, listed: bool = False) -> Path:
    """Write tokens and nothing else, as OLMo does; `listed` with the list of documents that Dolma writes."""
    (folder / "a").mkdir(parents=True, exist_ok=True)
    (folder / "a/part-0.npy").write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    if listed:
        ends = np.cumsum([own.size for own in documents]).tolist()
        lines = [f"{begin},{end},id,source,7\n" for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
        (folder / "a/part-0.csv.gz").write_bytes(gzip.compress("".join(lines).encode()))
    return folder


def write_npy(folder: Path, documents: list[Document], dtype: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "tokens.npy", np.concatenate(documents).astype(dtype))
    return folder
