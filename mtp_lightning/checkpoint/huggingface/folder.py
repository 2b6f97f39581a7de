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
from mtp_lightning.checkpoint.format.tensors import BLOCK_BYTES, Entry, read_header, read_into, read_tensor
from mtp_lightning.checkpoint.huggingface.canonical_names import TensorSource
from mtp_lightning.checkpoint.huggingface.configs import Config, UncoveredError, check_held, check_numbers, named
from mtp_lightning.checkpoint.huggingface.conversions import Conversion
from mtp_lightning.checkpoint.huggingface.families import FAMILIES, base_source, family_of, section_of
from mtp_lightning.checkpoint.huggingface.heads_layout import OF_HEADS, told_heads
from mtp_lightning.checkpoint.huggingface.meta_mtp import (
    SETTINGS,
    meta_section,
    meta_source,
    native_heads,
    num_extra_heads,
)
from mtp_lightning.checkpoint.huggingface.modules import (
    DEEPSEEK,
    MIMO,
    Native,
    declared_modules,
    module_beginnings,
    native_modules,
)
from mtp_lightning.checkpoint.huggingface.text_decoder import TextDecoder, open_text_decoder, with_modules
from mtp_lightning.checkpoint.huggingface.weight_files import find_snapshot, find_weights, read_json
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.untrusted import described, reason_of
from mtp_lightning.model.transformers_architecture import architecture_of
from mtp_lightning.recipe.schema.model import Family, ModelSection

CONFIG = "config.json"
DROPOUTS = ("attention_dropout", "hidden_dropout")


class Update(NamedTuple):
    """A low-rank update of a stored matrix."""

    factors: Callable[[], tuple[Tensor, Tensor]]  # reads A (R, D) and B (E, R)
    scale: float


class Made(NamedTuple):
    """A tensor that no file holds as it is: made of others, or one of several that are made of one."""

    conversion: Conversion
    entries: Mapping[str, Entry]
    files: Mapping[str, Path]

    def read(self, name: str) -> Tensor:
        """Read what it is made of, and make it."""
        return self.conversion.make(lambda source: read_tensor(self.files[source], self.entries[source]))[name]


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
    made_files: Path | None = None  # folder of settings and tokenizer that were made of it, where `path` is none
    made: Mapping[str, Made] = field(default_factory=dict)  # of tensors that no file holds as they are

    def base_source(self, place: str) -> TensorSource | None:
        """Find a place of the base model."""
        if self.settings_path.name == SETTINGS:
            return meta_source(place)
        assert self.section.family is not None
        return base_source(place, self.section.family)

    @property
    def vocabulary(self) -> tuple[str, str]:
        """Names of the stored embedding and of the stored unembedding."""
        if self.section.is_foreign:
            names = architecture_of(self.section).names
            return f"{names.decoder}.{names.embedding}.weight", f"{names.lm_head}.weight"
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
        whole = self.made[name].read(name).flatten() if name in self.made else None
        for start in range(0, numel, length):
            if whole is not None:
                yield start, whole[start : start + length]
                continue
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


def open_folder(path: Path, *, variant: str | None = None, family: Family | None = None) -> HFCheckpoint:
    """Open a folder as transformers (or Meta) writes it.

    A model that has no trunk here, or settings that this one does not cover, is opened by transformers' own classes.

    Args:
        path: the folder, or an entry of the hub's cache.
        variant: which of several sets of weights, as in `model.VARIANT.safetensors`.
        family: `transformers` opens any folder by that library's classes; None prefers the trunks here.

    Raises:
        CheckpointError: It has no settings, they are of an architecture or a kind that is not known here, its weights
            are not in safetensors files, or one of these is missing.
    """
    path = find_snapshot(path, (CONFIG, SETTINGS))
    config = _read_settings(path)
    check_numbers(config)
    if config.path.name == SETTINGS:
        return tied_as_stored(_of_meta(path, config, variant))
    own = family_of(config)
    if own is None or family == "transformers":
        return tied_as_stored(_of_transformers(path, config, variant, is_forced=family is not None))
    try:
        return tied_as_stored(_of_family(path, config, own, variant))
    except UncoveredError as error:
        refusal = error
    try:
        hf_checkpoint = _of_transformers(path, config, variant, is_forced=True)
    except CheckpointError as error:
        hint = f"{refusal.hint}. Nor can it be taken as family transformers: {error}"
        raise CheckpointError(refusal.expected, refusal.found, hint) from None
    note = f"Taken as family transformers, because here {refusal.expected}: found {refusal.found}"
    return tied_as_stored(replace(hf_checkpoint, notes=(note, *hf_checkpoint.notes)))


def _of_family(path: Path, config: Config, family: Family, variant: str | None) -> HFCheckpoint:
    """Open a folder of a family that has a trunk here."""
    weights = find_weights(path, "model*.safetensors", variant=variant)
    entries, files = read_entries(weights.read, FAMILIES[family].stored_name)
    section = section_of(config, family)
    num_extra = declared_modules(config)
    check_held(config, section, num_extra, entries)
    default = MIMO if family == "mimo" else DEEPSEEK
    return HFCheckpoint(
        path=path,
        what=family,
        section=section,
        native=native_modules(entries, section.num_hidden_layers, num_extra, default=default)
        or told_heads(config, section, family),
        entries=entries,
        files=files,
        end_of_document=first_end(config, section.vocab_size),
        settings_path=config.path,
        notes=(*_code(config), *_dropouts(config), *_beside(weights.beside)),
    )


def _of_meta(path: Path, config: Config, variant: str | None) -> HFCheckpoint:
    """Open a folder in Meta's own layout."""
    weights = find_weights(path, "*.safetensors", variant=variant)
    entries, files = read_entries(weights.read)
    section = meta_section(config, entries)
    check_held(config, section, num_extra_heads(config), entries)
    return HFCheckpoint(
        path=path,
        what="Meta's Llama",
        section=section,
        native=native_heads(config),
        entries=entries,
        files=files,
        end_of_document=first_end(config, section.vocab_size),
        settings_path=config.path,
        notes=(*_dropouts(config), *_beside(weights.beside)),
    )


def _of_transformers(path: Path, config: Config, variant: str | None, *, is_forced: bool) -> HFCheckpoint:
    """Open a folder by the classes of transformers; the text part of a model with others may have a trunk here."""
    weights = find_weights(path, "model*.safetensors", variant=variant)
    stored, stored_files = read_entries(weights.read)
    beginnings = module_beginnings(stored)
    modules = {name: one for name, one in stored.items() if name.startswith(beginnings)}
    beside = [name for name in stored if name.startswith(OF_HEADS)]
    base = {name: one for name, one in stored.items() if name not in beside and name not in modules}
    decoder = open_text_decoder(config, base)
    section = (None if is_forced else _own_section(config, decoder)) or decoder.section
    decoder, native = with_modules(decoder, config, modules)
    native = native or told_heads(config, section, section.family or "transformers")
    check_held(config, section, native.count if native else 0, stored)
    entries = {name: stored[name] for name in (*decoder.left, *beside)}
    files = {name: stored_files[name] for name in entries}
    made: dict[str, Made] = {}
    for conversion in decoder.conversions:
        for name, (dtype, shape) in conversion.forms.items():
            first = conversion.sources[0]
            entries[name], files[name] = stored[first], stored_files[first]
            if conversion.convert is not None:
                entries[name] = Entry(dtype, shape, 0, 0)
                made[name] = Made(conversion, stored, stored_files)
    return HFCheckpoint(
        path=path,
        what=decoder.architecture.name if section.is_foreign else str(section.family),
        section=section,
        native=native,
        entries=entries,
        files=files,
        end_of_document=first_end(config, section.vocab_size, default=_default_end(decoder.section)),
        settings_path=config.path,
        notes=(*_code(config), *decoder.notes, *_beside(weights.beside)),
        made=made,
    )


def _own_section(config: Config, decoder: TextDecoder) -> ModelSection | None:
    """Read the settings of a text decoder as one that has a trunk here, if it has."""
    own = Config(config.path, decoder.section.hf_config or {})
    try:
        family = family_of(own)
        return section_of(own, family) if family else None
    except UncoveredError:
        return None


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
    section = changed(hf_checkpoint.section, tie_word_embeddings=False)
    return replace(hf_checkpoint, section=section, notes=(*hf_checkpoint.notes, note))


def changed(section: ModelSection, **fields: int) -> ModelSection:
    """Change fields of a model section, and the settings of transformers that must agree with them."""
    if section.hf_config is None:
        return section.model_copy(update=fields)
    return section.model_copy(update={**fields, "hf_config": section.hf_config | fields})


def _dropouts(config: Config) -> list[str]:
    told = {name: config.get(name) for name in DROPOUTS}
    return [f"{name} is {described(rate)}; the trunk here has no dropout" for name, rate in told.items() if rate]


def _code(config: Config) -> list[str]:
    told = named(config.get("model_type", "no model_type"))
    note = f"The folder's own code (auto_map) is not run: what is known here of model_type {told} is what counts"
    return [note] if config.get("auto_map") else []


def _beside(names: list[str]) -> list[str]:
    return [f"Not read, as transformers does not read it either: {', '.join(names[:MOST_NAMES])}"] if names else []


def first_end(config: Config, vocab_size: int, *, default: int | None = None) -> int | None:
    """Return the id that ends a document: of several, the first; `default` where the settings do not say it."""
    told = config.get("eos_token_id")
    ends = told if isinstance(told, list) else [] if told is None else [told]
    for end in ends:
        if not (type(end) is int and 0 <= end < vocab_size):
            raise config.impossible(f"eos_token_id: {described(end)} (ids are below {vocab_size:,})")
    return ends[0] if ends else default


def _default_end(section: ModelSection) -> int | None:
    """Return the id that ends a document where only the text part or its class says it."""
    told = (section.hf_config or {}).get("eos_token_id")
    ends = told if isinstance(told, list) else [told]
    return next((end for end in ends if type(end) is int and 0 <= end < section.vocab_size), None)


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
            hint = "Download what is missing" if isinstance(error, FileNotFoundError) else "Correct the permissions"
            raise CheckpointError("files of weights must be readable", f"{path}: {reason_of(error)}", hint) from None
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
