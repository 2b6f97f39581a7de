"""A folder of somebody else's model: its settings, and which tensor lies in which file."""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.untrusted import OddFileError, described, read_object, reason_of
from mtp_lightning.recipe.schema.model import ModelSection

CONFIG = "config.json"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
MOST_SHARDS = 100_000
MOST_MODULES = 1024
LONGEST_NAME_BYTES = 255
DECLARED = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
_HARMLESS = re.compile(r"[A-Za-z0-9._-]+")
CONVERSION = (
    "import torch; from safetensors.torch import save_file; "
    "tensors = torch.load('{file}', map_location='cpu', weights_only=True); "
    "save_file({{name: one.clone().contiguous() for name, one in tensors.items()}}, '{target}')"
)


@dataclass(frozen=True)
class HFCheckpoint:
    """A model of others, opened; nothing but headers has been read."""

    path: Path
    what: str  # family, for people
    section: ModelSection
    native: Native | None
    entries: dict[str, Entry]
    files: dict[str, Path]  # of every tensor
    end_of_document: int | None
    settings_path: Path

    def base_source(self, place: str) -> TensorSource | None:
        """Find a place of the base model."""
        if self.settings_path.name == SETTINGS:
            return meta_source(place)
        assert self.section.family is not None
        return FAMILIES[self.section.family].source(place)

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Read a stored tensor in consecutive flat blocks of at most 4 MiB; yields each with its first value."""
        entry = self.entries[name]
        numel, length = math.prod(entry.shape), BLOCK_BYTES // entry.dtype.itemsize
        for start in range(0, numel, length):
            yield start, self._values(name, start, min(length, numel - start))

    def read(self, name: str) -> Tensor:
        """Read a stored tensor into memory."""
        shape = self.entries[name].shape
        return self._values(name, 0, math.prod(shape)).view(shape)

    def is_same(self, name: str, other: str) -> bool:
        """Compare two stored tensors, bit for bit."""
        if other not in self.entries or self.entries[name][:2] != self.entries[other][:2]:
            return False
        return all(
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for (_, a), (_, b) in zip(self.blocks(name), self.blocks(other), strict=True)
        )

    def _values(self, name: str, start: int, length: int) -> Tensor:
        entry = self.entries[name]
        values = torch.empty(length, dtype=entry.dtype)
        with self.files[name].open("rb") as file:
            read_into(values, file, entry.begin + start * entry.dtype.itemsize)
        return values


def open_folder(path: Path) -> HFCheckpoint:
    """Open a folder as transformers (or Meta) writes it.

    Raises:
        CheckpointError: It has no settings, they are of an architecture or a kind that is not known here, its weights
            are not in safetensors files, or one of these is missing.
    """
    config = _read_settings(path)
    check_numbers(config)
    family = None if config.path.name == SETTINGS else family_of(config)
    entries, files = _read_entries(path, "model*.safetensors" if family else "*.safetensors")
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
    return HFCheckpoint(
        path=path,
        what=family or "Meta's Llama",
        section=section,
        native=native,
        entries=entries,
        files=files,
        end_of_document=_first_end(config, section.vocab_size),
        settings_path=config.path,
    )


def _first_end(config: Config, vocab_size: int) -> int | None:
    """Return the id that ends a document: of several, the first."""
    told = config.get("eos_token_id")
    ends = told if isinstance(told, list) else [] if told is None else [told]
    for end in ends:
        if not (type(end) is int and 0 <= end < vocab_size):
            raise config.impossible(f"eos_token_id: {described(end)} (ids are below {vocab_size:,})")
    return ends[0] if ends else None


def _read_settings(path: Path) -> Config:
    hint = "Give the folder that a model was downloaded to or saved in by transformers"
    try:
        found = next((path / name for name in (CONFIG, SETTINGS) if (path / name).is_file()), None)
        is_folder = path.is_dir()
    except OSError as error:
        raise CheckpointError("a folder to import must be readable", f"{path}: {reason_of(error)}", hint) from None
    if found is None:
        raise CheckpointError(
            f"a folder to import must have a {CONFIG} (or Meta's {SETTINGS})",
            f"neither in {path}" if is_folder else f"no folder {path}",
            hint,
        )
    values = _read_json(found)
    if named(values.get("format")).startswith("mtp_lightning"):
        raise CheckpointError(
            "a folder to import must be of another program",
            f"an exported folder of mtp_lightning, {path}",
            f"Train from it as it is: init.path={path}",
        )
    return Config(found, values)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, OddFileError) as error:
        raise _unreadable(path, reason_of(error)) from None


def _unreadable(path: Path, found: str) -> CheckpointError:
    return CheckpointError(f"{path.name} must be a JSON object", f"{found}, in {path}", "Download the file again")


def _read_entries(path: Path, pattern: str) -> tuple[dict[str, Entry], dict[str, Path]]:
    """Read the headers of all files of weights."""
    entries: dict[str, Entry] = {}
    files: dict[str, Path] = {}
    for file in _weight_files(path, pattern):
        for name, entry in read_header(file).entries.items():
            if name in entries:
                raise CheckpointError(
                    "every tensor must lie in one file whole",
                    f"{name} in both {files[name].name} and {file.name} of {path}",
                    "Merge what was cut for several GPUs first, or remove files that are left over",
                )
            entries[name], files[name] = entry, file
    return entries, files


def _weight_files(path: Path, pattern: str) -> list[Path]:
    """List the files of weights that a folder speaks of, or has."""
    if (path / INDEX).is_file():
        listed = _read_json(path / INDEX).get("weight_map")
        if not isinstance(listed, dict):
            raise _unreadable(path / INDEX, "no weight_map")
        names = [*listed.values()]
        _check_names(path / INDEX, names)
        _check_shards(path, names)
        return [path / name for name in dict.fromkeys(names)]
    if (path / WHOLE).is_file():
        return [path / WHOLE]
    found = sorted(path.glob(pattern))
    if not found:
        raise _without_weights(path)
    numbered = [name.stem.rpartition("-of-") for name in found]
    if all(middle and total.isdecimal() for _, middle, total in numbered):
        total = numbered[0][2]
        if int(total) > MOST_SHARDS:
            raise _without_shards(path, f"{len(found)} of {total} files")
        width = len(numbered[0][0].rpartition("-")[2])
        stem = numbered[0][0].rpartition("-")[0]
        _check_shards(path, [f"{stem}-{n:0{width}d}-of-{total}.safetensors" for n in range(1, int(total) + 1)])
    return found


def _check_names(index: Path, names: list[Any]) -> None:
    """Check that all files are named as files of the folder itself."""
    odd = [name for name in names if not _is_shard_name(name)]
    if odd:
        raise CheckpointError(
            "weight_map must name files *.safetensors of the folder itself",
            f"{described(odd[0])}, in {index}",
            "Download the file again",
        )


def _is_shard_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name.isprintable()
        and name.endswith(".safetensors")
        and not {"/", "\\"} & set(name)
        and len(os.fsencode(name)) <= LONGEST_NAME_BYTES
    )


def _check_shards(path: Path, names: list[str]) -> None:
    missing = dict.fromkeys(name for name in dict.fromkeys(names) if not (path / name).is_file())
    if missing:
        of = f", with {sum(name in missing for name in names)} tensors" if len(names) > len(set(names)) else ""
        more = f" and {len(missing) - MOST_NAMES} more" if len(missing) > MOST_NAMES else ""
        raise _without_shards(path, f"no {', '.join([*missing][:MOST_NAMES])}{more}{of}")


def _without_shards(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "every shard of the weights must be there", f"{found}, in {path}", "Download what is missing"
    )


def _without_weights(path: Path) -> CheckpointError:
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if not pickles:
        return CheckpointError(
            "a folder to import must hold weights in safetensors files",
            f"none in {path}",
            "Download the folder again, with its *.safetensors",
        )
    targets = [WHOLE] if len(pickles) == 1 else [f"model-{n:05d}-of-{len(pickles):05d}.safetensors" for n in (1,)]
    file = pickles[0] if _HARMLESS.fullmatch(pickles[0]) else "FILE"  # it is pasted into a shell
    command = CONVERSION.format(file=file, target=targets[0])
    more = "" if len(pickles) == 1 else f", and so for the other {len(pickles) - 1} files"
    return CheckpointError(
        "weights must be in safetensors files: a pickle can run any program when it is opened",
        f"{', '.join(pickles)} in {path}",
        f'Take a release with *.safetensors, or convert it where you trust it: python -c "{command}"{more}',
    )
