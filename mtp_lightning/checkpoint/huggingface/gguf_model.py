"""A GGUF file of llama.cpp as a model of others, dequantised when it is read."""

import importlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtp_lightning.checkpoint.format.tensors import BLOCK_BYTES, Entry, read_into
from mtp_lightning.checkpoint.huggingface.canonical_names import TensorSource
from mtp_lightning.checkpoint.huggingface.configs import Config, check_held, check_numbers
from mtp_lightning.checkpoint.huggingface.families import section_of
from mtp_lightning.checkpoint.huggingface.folder import CONFIG, HFCheckpoint, first_end
from mtp_lightning.checkpoint.huggingface.gguf_file import GGUFHeader, check_places, read_gguf
from mtp_lightning.checkpoint.huggingface.gguf_settings import (
    ARCHITECTURES,
    FREQUENCIES,
    TAKE_FOLDER,
    Architecture,
    architecture_of,
    settings_of_gguf,
    source_of,
)
from mtp_lightning.checkpoint.huggingface.gguf_tokenizer import write_tokenizer
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.untrusted import described

PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class Quantised(NamedTuple):
    """How the values of a tensor are packed."""

    kind: int  # number in the format
    values_per_block: int
    bytes_per_block: int


@dataclass(frozen=True)
class GGUFCheckpoint(HFCheckpoint):
    """A GGUF file, opened; nothing but its header has been read."""

    architecture: Architecture = ARCHITECTURES["llama"]
    quantised: dict[str, Quantised] = field(default_factory=dict)

    def base_source(self, place: str) -> TensorSource | None:
        """Find a place of the base model."""
        return source_of(place, self.architecture)

    def _stored_blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        if name not in self.quantised:
            yield from super()._stored_blocks(name)
            return
        kind, num_values, num_bytes = self.quantised[name]
        entry = self.entries[name]
        num_blocks, at_once = (entry.end - entry.begin) // num_bytes, BLOCK_BYTES // 4 // num_values
        for first in range(0, num_blocks, at_once):
            packed = torch.empty(min(at_once, num_blocks - first) * num_bytes, dtype=torch.uint8)
            with self.files[name].open("rb") as file:
                read_into(packed, file, entry.begin + first * num_bytes)
            yield first * num_values, torch.from_numpy(_unpacked(packed.numpy(), kind))


def is_gguf(path: Path) -> bool:
    """Tell whether a path is meant to be a GGUF file."""
    try:
        return path.suffix.lower() == ".gguf" and not path.is_dir()
    except OSError:
        return False  # what is wrong is told when it is read as a folder


def open_gguf(path: Path, made_files: Path) -> GGUFCheckpoint:
    """Open a GGUF file; its tokenizer and settings are written into a folder, as transformers would write them.

    Args:
        path: the file; of a model in several, any of them.
        made_files: folder to write into.

    Raises:
        CheckpointError: it is not GGUF, is damaged, of an architecture or type that is not known here, or holds a
            tokenizer that is not.
    """
    headers = read_gguf(path)
    first = headers[0]
    architecture = architecture_of(first)
    entries, files, quantised, kinds = _tensors(headers)
    frequencies = entries.pop(FREQUENCIES, None)
    factors = _read_plain(files[FREQUENCIES], frequencies) if frequencies else None
    config = Config(first.path, settings_of_gguf(first, entries, factors))
    check_numbers(config)
    section = section_of(config, architecture.family)
    check_held(config, section, 0, entries)
    end = first_end(config, section.vocab_size)
    notes = write_tokenizer(first, section.vocab_size, made_files)
    (made_files / CONFIG).write_text(json.dumps(config.values, indent=2, sort_keys=True) + "\n")
    return GGUFCheckpoint(
        path=path,
        what=architecture.family,
        section=section,
        native=None,
        entries=entries,
        files=files,
        end_of_document=end,
        settings_path=first.path,
        notes=(*_told(kinds, quantised), *notes),
        tokenizer_folder=made_files,
        made_files=made_files,
        architecture=architecture,
        quantised=quantised,
    )


def _told(kinds: Counter[str], quantised: dict[str, Quantised]) -> list[str]:
    """Say which types the weights were stored in."""
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    if not quantised:
        return [f"Types of the stored tensors: {counts}"]
    return [
        f"The weights were quantised ({counts} tensors) and are dequantised here: the model is what the file holds, "
        "not what it was quantised from"
    ]


def _library(path: Path) -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise CheckpointError(
            f"the package gguf must be installed to read {path.name}",
            str(error),
            "Install it: pip install 'mtp_lightning[gguf]'",
        ) from error


def _tensors(
    headers: Sequence[GGUFHeader],
) -> tuple[dict[str, Entry], dict[str, Path], dict[str, Quantised], Counter[str]]:
    """Find every tensor's place, type and packing."""
    library = _library(headers[0].path)
    entries: dict[str, Entry] = {}
    files: dict[str, Path] = {}
    quantised: dict[str, Quantised] = {}
    kinds: Counter[str] = Counter()
    for header in headers:
        places = {}
        for name, (number, shape, offset) in header.tensors.items():
            kind, packing = _packing(library, header.path, name, number)
            kinds[kind] += 1
            if shape[-1] % packing.values_per_block:
                raise CheckpointError(
                    f"rows of a tensor of {kind} must be of whole blocks of {packing.values_per_block} values",
                    f"{described(name)} {list(shape)}, in {header.path}",
                    "Download the file again",
                )
            begin = header.data_begin + offset
            end = begin + math.prod(shape) // packing.values_per_block * packing.bytes_per_block
            places[name] = (begin, end)
            entries[name] = Entry(PLAIN_TYPES.get(kind, torch.float32), shape, begin, end)
            files[name] = header.path
            if kind not in PLAIN_TYPES:
                quantised[name] = packing
        check_places(header, places)
    return entries, files, quantised, kinds


def _packing(library: Any, path: Path, name: str, number: int) -> tuple[str, Quantised]:
    """Look up a type by its number: its name, and how it is packed."""
    try:
        kind = library.GGMLQuantizationType(number)
        packing = Quantised(number, *library.GGML_QUANT_SIZES[kind])
        if kind.name not in PLAIN_TYPES:
            _unpacked(np.zeros(packing.bytes_per_block, np.uint8), number)
    except (ValueError, KeyError, NotImplementedError):
        known = [one.name for one in library.GGMLQuantizationType if one.value == number]
        raise CheckpointError(
            "weights in a *.gguf file must be of a type that the package gguf can dequantise",
            f"{known[0] if known else f'the type {number}'} for {described(name)}, in {path}",
            f"Update it (pip install -U gguf), or take the model in another type, such as Q8_0. {TAKE_FOLDER}",
        ) from None
    return kind.name, packing


def _unpacked(packed: NDArray[np.uint8], kind: int) -> NDArray[np.float32]:
    """Dequantise whole blocks: (bytes,) -> (values,)."""
    library = importlib.import_module("gguf")
    with np.errstate(all="ignore"):  # what is not finite is refused by name later
        values = library.dequantize(packed.reshape(1, -1), library.GGMLQuantizationType(kind))
    return np.ascontiguousarray(values, dtype=np.float32).reshape(-1)


def _read_plain(path: Path, entry: Entry) -> NDArray[np.float32]:
    """Read a small tensor of plain numbers."""
    if entry.dtype is not torch.float32 or math.prod(entry.shape) > BLOCK_BYTES:
        found = f"{list(entry.shape)} of another type, in {path}"
        raise CheckpointError(f"{FREQUENCIES} must be a row of fp32 numbers", found, "Download the file again")
    values = torch.empty(math.prod(entry.shape))
    with path.open("rb") as file:
        read_into(values, file, entry.begin)
    return values.numpy()
