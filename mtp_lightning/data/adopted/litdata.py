"""litdata's chunks of tokens, as its `TokensLoader` reads them: an index.json, and chunk files that it names.

number of items N, uint32 · places of the items and of their end, in bytes, (N + 1) x uint32 · tokens
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mtp_lightning.data.adopted.token_file import Run, Runs, TokenFile, Words, check_type, whole_tokens, wrong_file
from mtp_lightning.files.untrusted import OddFileError, read_json, reason_of, shown

INDEX_NAME = "index.json"
MOST_INDEX_BYTES = 1 << 30
TENSORS = {11: "<u1", 12: "<i1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4", 17: "<i8", 18: "<i8", 20: "<u2"}
ARRAYS = {0: "<i1", 1: "<i2", 2: "<i4", 3: "<i8", 4: "<u1", 5: "<u2", 6: "<u4", 7: "<u8"}
TYPES = {"no_header_tensor": TENSORS, "no_header_numpy": ARRAYS}
Count = Annotated[int, Field(ge=0, le=1 << 60)]


class _Chunk(BaseModel):
    model_config = ConfigDict(strict=True)

    filename: Annotated[str, Field(pattern=r"^[^/\x00]{1,255}$")]
    chunk_bytes: Count
    chunk_size: Annotated[int, Field(ge=0, lt=1 << 32)]  # items
    dim: Count | None = None  # tokens


class _Config(BaseModel):
    model_config = ConfigDict(strict=True)

    data_format: list[str]
    compression: str | None = None
    encryption: Any = None


class _Content(BaseModel):
    model_config = ConfigDict(strict=True)

    chunks: list[_Chunk] = Field(min_length=1)
    config: _Config


def litdata_files(path: Path) -> Iterator[TokenFile]:
    """Yield the chunks of an index.json, in its order.

    Raises:
        DataError: It is no index of tokens, or a chunk is not as it says.
    """
    content = _content(path)
    dtype = _type_of(path, content.config)
    for chunk in content.chunks:
        file = path.with_name(chunk.filename)
        head_bytes = 4 * (chunk.chunk_size + 2)
        num_bytes = file.stat().st_size if file.is_file() else -1
        if num_bytes < head_bytes:
            found = "no such file" if num_bytes < 0 else f"{num_bytes:,} bytes"
            raise wrong_file(f"chunk {file} must have its {chunk.chunk_size:,} items, as {path.name} says", found)
        num_tokens = whole_tokens(file, num_bytes - head_bytes, dtype)
        if chunk.dim != num_tokens:
            said = "none" if chunk.dim is None else f"{chunk.dim:,}"
            raise wrong_file(
                f"chunk {file} must have the tokens of its `dim` in {path.name}, {said}", f"{num_tokens:,}"
            )
        yield TokenFile(
            path=file,
            dtype=dtype,
            begin_bytes=head_bytes,
            num_tokens=num_tokens,
            runs=_runs_of(file, chunk.chunk_size, dtype),
            index=path,
        )


def _runs_of(file: Path, num_items: int, dtype: np.dtype[Any]) -> Runs:
    """Return what finds the items of a chunk; each is a document."""

    def runs(words: Words) -> Iterator[Run]:
        head = np.fromfile(file, dtype="<u4", count=num_items + 2).astype(np.int64)
        places = head[1:]
        lengths, phases = np.divmod(np.diff(places), dtype.itemsize)
        is_whole = places[0] == 4 * head.size and lengths.sum() == words.size
        if head[0] != num_items or not is_whole or (lengths < 0).any() or phases.any():
            found = f"{head[0]:,} items at bytes {places[0]:,} to {places[-1]:,}"
            raise wrong_file(f"chunk {file} must have {num_items:,} items of whole tokens, one after another", found)
        yield Run(0, lengths[lengths > 0])

    return runs


def _content(path: Path) -> _Content:
    expected = f"{path} must be an index of litdata"
    try:
        return _Content.model_validate(read_json(path, MOST_INDEX_BYTES))
    except (OSError, OddFileError) as error:
        raise wrong_file(expected, reason_of(error)) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise wrong_file(expected, shown(f"{'.'.join(map(str, first['loc']))}: {first['msg']}")) from error


def _type_of(path: Path, config: _Config) -> np.dtype[Any]:
    tool = "Write it again with litdata's `optimize` and a `TokensLoader`"
    if config.compression or config.encryption:
        kind = "compressed" if config.compression else "encrypted"
        raise wrong_file(
            f"the chunks of {path} must be as they are read: they are used in place", kind, f"{tool}, plain"
        )
    name, _, code = config.data_format[0].partition(":") if config.data_format else ("", "", "")
    if len(config.data_format) != 1 or name not in TYPES:
        expected = f"items of {path} must be flat tensors of tokens, {' or '.join(TYPES)}"
        raise wrong_file(expected, shown(config.data_format), f"{tool}; give it one flat tensor of ids per document")
    stored = TYPES[name].get(int(code)) if code.isascii() and code.isdigit() and len(code) < 4 else None
    return check_type(path, np.dtype(stored) if stored else None, f"type {shown(code)} of {name}")
