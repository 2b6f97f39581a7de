"""A folder of somebody else's model: its settings, and which tensor lies in which file."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_lightning.checkpoint.convert.merge_lora import updated_blocks
from mtp_lightning.checkpoint.format.read_shards import MOST_NAMES
from mtp_lightning.checkpoint.format.tensors import BLOCK_BYTES, Entry, read_header, read_into
from mtp_lightning.checkpoint.huggingface.canonical_names import TensorSource
from mtp_lightning.checkpoint.huggingface.configs import Config, check_held, check_numbers, named
from mtp_lightning.checkpoint.huggingface.families import FAMILIES, family_of, section_of
from mtp_lightning.checkpoint.huggingface.meta_mtp import (
    SETTINGS,
    meta_section,
    meta_source,
    native_heads,
    num_extra_heads,
)
from mtp_lightning.checkpoint.huggingface.modules import DEEPSEEK, MIMO, Native, native_modules
from mtp_lightning.checkpoint.huggingface.weight_files import find_snapshot, find_weights, read_json
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.untrusted import described, reason_of
from mtp_lightning.recipe.schema.model import ModelSection

CONFIG = "config.json"
MOST_MODULES = 1024
DROPOUTS = ("attention_dropout", "hidden_dropout")
DECLARED = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")


class Update(NamedTuple):
    """A low-rank update of a stored matrix."""

    factors: Callable[[], tuple[Tensor, Tensor]]  # reads A (R, D) and B (E, R)
    scale: float


@dataclass(frozen=True)
class HFCheckpoint:
    """A model of others, opened; nothing but headers has been read.

    A tensor is read as the model computes with it: low-rank updates are added, and rows for new tokens follow.
    """

    path: Path
    what: str  # family, for people
    section: ModelSection
    native: Native | None
    entries: dict[str, Entry]
    files: dict[str, Path]  # of every tensor
    end_of_document: int | None
    settings_path: Path
    notes: tuple[str, ...] = ()  # what is to be said of the folder
    updates: Mapping[str, Update] = field(default_factory=dict)
    new_rows: Mapping[str, int] = field(default_factory=dict)  # of these tensors' shapes, how many are not in the file
    tokenizer_folder: Path | None = None  # None means `path`
    made: Path | None = None  # folder of files that were made of it, where `path` is none

    def base_source(self, place: str) -> TensorSource | None:
        """Find a place of the base model."""
        if self.settings_path.name == SETTINGS:
            return meta_source(place)
        assert self.section.family is not None
        return FAMILIES[self.section.family].source(place)

    @property
    def vocabulary(self) -> tuple[str, str]:
        """Names of the stored embedding and of the stored unembedding."""
        embedding, matrix = self.base_source("embed_tokens.weight"), self.base_source("lm_head.weight")
        assert embedding is not None
        assert matrix is not None
        return embedding.stored, matrix.stored

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Read a tensor in consecutive flat blocks of at most 4 MiB; yields each with its first value."""
        yield from self._trained_blocks(name)
        if num_rows := self.new_rows.get(name):
            yield from self._mean_rows(name, num_rows)

    def read(self, name: str) -> Tensor:
        """Read a tensor into memory."""
        entry = self.entries[name]
        whole = torch.empty(math.prod(entry.shape), dtype=entry.dtype)
        for start, values in self.blocks(name):
            whole[start : start + values.numel()] = values
        return whole.view(entry.shape)

    def is_same(self, name: str, other: str) -> bool:
        """Compare two tensors, bit for bit."""
        if other not in self.entries or self.entries[name][:2] != self.entries[other][:2]:
            return False
        return all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for (_, a), (_, b) in zip(self.blocks(name), self.blocks(other), strict=True)
        )

    def _stored_blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        entry = self.entries[name]
        length = BLOCK_BYTES // entry.dtype.itemsize
        numel = math.prod(entry.shape) - math.prod((self.new_rows.get(name, 0), *entry.shape[1:]))
        for start in range(0, numel, length):
            values = torch.empty(min(length, numel - start), dtype=entry.dtype)
            with self.files[name].open("rb") as file:
                read_into(values, file, entry.begin + start * entry.dtype.itemsize)
            yield start, values

    def _trained_blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Read what a file holds, with its update."""
        blocks = self._stored_blocks(name)
        if update := self.updates.get(name):
            down, up = update.factors()
            blocks = updated_blocks(blocks, down, up, update.scale)
        return blocks

    def _mean_rows(self, name: str, num_rows: int) -> Iterator[tuple[int, Tensor]]:
        """Make rows for new tokens, each the mean of those that are stored."""
        num_stored, width = self.entries[name].shape[0] - num_rows, self.entries[name].shape[1]
        total = torch.zeros(width, dtype=torch.float64)
        for start, values in self._trained_blocks(name):
            before = start % width
            rows = torch.nn.functional.pad(values.double(), (before, -(before + values.numel()) % width))
            total += rows.view(-1, width).sum(0)
        mean = (total / num_stored).to(self.entries[name].dtype)
        for row in range(num_stored, num_stored + num_rows):
            yield row * width, mean


def open_folder(path: Path, *, variant: str | None = None) -> HFCheckpoint:
    """Open a folder as transformers (or Meta) writes it.

    Args:
        path: the folder, or an entry of the hub's cache.
        variant: which of several sets of weights, as in `model.VARIANT.safetensors`.

    Raises:
        CheckpointError: It has no settings, they are of an architecture or a kind that is not known here, its weights
            are not in safetensors files, or one of these is missing.
    """
    path = find_snapshot(path, (CONFIG, SETTINGS))
    config = _read_settings(path)
    check_numbers(config)
    family = None if config.path.name == SETTINGS else family_of(config)
    weights = find_weights(path, "model*.safetensors" if family else "*.safetensors", variant=variant)
    entries, files = read_entries(weights.read, FAMILIES[family].stored_name if family else str)
    if family:
        section = section_of(config, family)
        num_extra = max(config.whole(name, 0, least=0, most=MOST_MODULES) or 0 for name in DECLARED)
    else:
        section, num_extra = meta_section(config, entries), num_extra_heads(config)
    check_held(config, section, num_extra, entries)
    if family:
        default = MIMO if family == "mimo" else DEEPSEEK
        native = native_modules(entries, section.num_hidden_layers, num_extra, default=default)
    else:
        native = native_heads(config)
    hf_checkpoint = HFCheckpoint(
        path=path,
        what=family or "Meta's Llama",
        section=section,
        native=native,
        entries=entries,
        files=files,
        end_of_document=first_end(config, section.vocab_size),
        settings_path=config.path,
        notes=(*_dropouts(config), *_beside(weights.beside)),
    )
    return tied_as_stored(hf_checkpoint)


def tied_as_stored(hf_checkpoint: HFCheckpoint) -> HFCheckpoint:
    """Read a vocabulary that is said to be tied as transformers 5 does: two matrices that differ are not tied."""
    embedding, matrix = hf_checkpoint.vocabulary
    entries, files = hf_checkpoint.entries, hf_checkpoint.files
    if not hf_checkpoint.section.tie_word_embeddings or matrix not in entries:
        return hf_checkpoint
    if embedding not in entries:
        entries, files = {**entries, embedding: entries[matrix]}, {**files, embedding: files[matrix]}
        return replace(hf_checkpoint, entries=entries, files=files)
    if hf_checkpoint.is_same(matrix, embedding):
        return hf_checkpoint
    note = (
        f"tie_word_embeddings is true, but {matrix} is stored and differs from {embedding}: both are kept, as "
        "transformers 5 does (before, it used the embedding alone: remove the tensor to get that)"
    )
    section = hf_checkpoint.section.model_copy(update={"tie_word_embeddings": False})
    return replace(hf_checkpoint, section=section, notes=(*hf_checkpoint.notes, note))


def _dropouts(config: Config) -> list[str]:
    told = {name: config.get(name) for name in DROPOUTS}
    return [f"{name} is {described(rate)}; the trunk here has no dropout" for name, rate in told.items() if rate]


def _beside(names: list[str]) -> list[str]:
    return [f"Not read, as transformers does not read it either: {', '.join(names[:MOST_NAMES])}"] if names else []


def first_end(config: Config, vocab_size: int) -> int | None:
    """Return the id that ends a document: of several, the first."""
    told = config.get("eos_token_id")
    ends = told if isinstance(told, list) else [] if told is None else [told]
    for end in ends:
        if not (type(end) is int and 0 <= end < vocab_size):
            raise config.impossible(f"eos_token_id: {described(end)} (ids are below {vocab_size:,})")
    return ends[0] if ends else None


def _read_settings(path: Path) -> Config:
    hint = (
        "Give the folder that a model was downloaded to (hf download ORG/NAME --local-dir FOLDER) or saved in by "
        "transformers"
    )
    try:
        found = next((path / name for name in (CONFIG, SETTINGS) if (path / name).is_file()), None)
        is_folder = path.is_dir()
    except OSError as error:
        raise CheckpointError("a folder to import must be readable", f"{path}: {reason_of(error)}", hint) from None
    if found is None:
        raise CheckpointError(
            f"a folder to import must have a {CONFIG} (or Meta's {SETTINGS})",
            f"neither in {path}" if is_folder else f"{'a file' if path.is_file() else 'no folder'} {path}",
            f"Give the file: {found_gguf}" if (found_gguf := _gguf_in(path)) else hint,
        )
    values = read_json(found)
    if named(values.get("format")).startswith("mtp_lightning"):
        raise CheckpointError(
            "a folder to import must be of another program",
            f"an exported folder of mtp_lightning, {path}",
            f"Train from it as it is: init.path={path}",
        )
    return Config(found, values)


def _gguf_in(path: Path) -> Path | None:
    """Find a file of llama.cpp in a folder without settings."""
    return min(path.glob("*.gguf"), default=None)


def read_entries(
    paths: Iterable[Path], complete: Callable[[str], str] = str
) -> tuple[dict[str, Entry], dict[str, Path]]:
    """Read the headers of files of weights; `complete` turns a name into the one to be used where that is free.

    Raises:
        CheckpointError: a file cannot be read, or a tensor lies in two of them.
    """
    entries: dict[str, Entry] = {}
    files: dict[str, Path] = {}
    for path in paths:
        try:
            header = read_header(path).entries
        except OSError as error:
            found = f"{path}: {reason_of(error)}"
            raise CheckpointError("files of weights must be readable", found, "Correct the permissions") from None
        for name, entry in header.items():
            if name in entries:
                raise CheckpointError(
                    "every tensor must lie in one file whole",
                    f"{name} in both {files[name].name} and {path.name} of {path.parent}",
                    "Merge what was cut for several GPUs first, or remove files that are left over",
                )
            entries[name], files[name] = entry, path
    names = {name: full if (full := complete(name)) not in entries else name for name in entries}
    return {names[name]: one for name, one in entries.items()}, {names[name]: one for name, one in files.items()}
