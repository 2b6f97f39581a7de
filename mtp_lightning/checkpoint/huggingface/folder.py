"""A folder of somebody else's model: its settings, and which tensor lies in which file."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_lightning.checkpoint.format.read_shards import MOST_NAMES
from mtp_lightning.checkpoint.format.tensors import Entry, read_header
from mtp_lightning.checkpoint.huggingface.configs import Config, named, possible_settings
from mtp_lightning.checkpoint.huggingface.families import FAMILIES, family_of, section_of
from mtp_lightning.checkpoint.huggingface.meta_mtp import (
    SETTINGS,
    meta_cell,
    meta_section,
    native_heads,
    num_extra_heads,
)
from mtp_lightning.checkpoint.huggingface.modules import DEEPSEEK, MIMO, Native, native_modules
from mtp_lightning.checkpoint.huggingface.sizes import check_held, check_numbers
from mtp_lightning.checkpoint.huggingface.tensor_layouts import Cell
from mtp_lightning.errors import CheckpointError
from mtp_lightning.launch.untrusted import OddFileError, read_object, reason_of, shown
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
class Foreign:
    """A model of others, opened; nothing but headers has been read."""

    path: Path
    what: str  # family, for people
    section: ModelSection
    native: Native | None
    entries: dict[str, Entry]
    files: dict[str, Path]  # of every tensor
    end_of_document: int | None
    settings_path: Path

    def base_cell(self, place: str) -> Cell | None:
        """Find a place of the base model."""
        if self.settings_path.name == SETTINGS:
            return meta_cell(place)
        assert self.section.family is not None
        return FAMILIES[self.section.family].cell(place)


def open_folder(path: Path) -> Foreign:
    """Open a folder as transformers (or Meta) writes it.

    Raises:
        CheckpointError: It has no settings, they are of an architecture or a kind that is not known here, its weights
            are not in safetensors files, or one of these is missing.
    """
    config = _read_settings(path)
    check_numbers(config)
    if config.path.name == SETTINGS:
        entries, files = _read_entries(path, "*.safetensors")
        with possible_settings(config):
            section = meta_section(config, entries)
        check_held(config, section, num_extra_heads(config), entries)
        native, what = native_heads(config), "Meta's Llama"
    else:
        family = family_of(config)
        entries, files = _read_entries(path, "model*.safetensors")
        section = section_of(config, family)
        declared = max(config.whole(name, 0, least=0, most=MOST_MODULES) or 0 for name in DECLARED)
        check_held(config, section, declared, entries)
        default = MIMO if family == "mimo" else DEEPSEEK
        native, what = native_modules(entries, section.num_hidden_layers, declared, default=default), family
    return Foreign(
        path=path,
        what=what,
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
            raise config.impossible(f"eos_token_id: {shown(end)} (ids are below {vocab_size:,})")
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
            f"{shown(odd[0])}, in {index}",
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
