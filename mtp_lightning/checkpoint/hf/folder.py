"""A folder of somebody else's model: its settings, and which tensor lies in which file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtp_lightning.checkpoint.hf.configs import Config, possible_settings
from mtp_lightning.checkpoint.hf.families import FAMILIES, family_of, section_of
from mtp_lightning.checkpoint.hf.meta import SETTINGS, meta_cell, meta_section, native_heads
from mtp_lightning.checkpoint.hf.modules import DEEPSEEK, MIMO, Native, native_modules
from mtp_lightning.checkpoint.hf.packings import Cell
from mtp_lightning.checkpoint.tensors import Entry, read_header
from mtp_lightning.errors import CheckpointError
from mtp_lightning.recipe.model_sections import ModelSection

CONFIG = "config.json"
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
DECLARED = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
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
    if config.path.name == SETTINGS:
        entries, files = _read_entries(path, "*.safetensors")
        with possible_settings(config):
            section = meta_section(config, entries)
        native, what = native_heads(config), "Meta's Llama"
    else:
        family = family_of(config)
        entries, files = _read_entries(path, "model*.safetensors")
        section = section_of(config, family)
        declared = max(int(config.get(name, 0)) for name in DECLARED)
        default = MIMO if family == "mimo" else DEEPSEEK
        native, what = native_modules(entries, section.num_layers, declared, default=default), family
    return Foreign(
        path=path,
        what=what,
        section=section,
        native=native,
        entries=entries,
        files=files,
        end_of_document=_first_end(config),
        settings_path=config.path,
    )


def _first_end(config: Config) -> int | None:
    """Return the id that ends a document: of several, the first."""
    ends = config.get("eos_token_id")
    first = ends[0] if isinstance(ends, list) and ends else ends
    return first if isinstance(first, int) else None


def _read_settings(path: Path) -> Config:
    found = next((path / name for name in (CONFIG, SETTINGS) if (path / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"a folder to import must have a {CONFIG} (or Meta's {SETTINGS})",
            f"neither in {path}" if path.is_dir() else f"no folder {path}",
            "Give the folder that a model was downloaded to or saved in by transformers",
        )
    values = _read_json(found)
    if str(values.get("format", "")).startswith("mtp_lightning"):
        raise CheckpointError(
            "a folder to import must be of another program",
            f"an exported folder of mtp_lightning, {path}",
            f"Train from it as it is: run.start_from={path}",
        )
    return Config(found, values)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from None
    if not isinstance(values, dict):
        raise _unreadable(path, type(values).__name__)
    return values


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
        names = [Path(str(name)).name for name in listed.values()]
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
        width = len(numbered[0][0].rpartition("-")[2])
        stem = numbered[0][0].rpartition("-")[0]
        _check_shards(path, [f"{stem}-{n:0{width}d}-of-{total}.safetensors" for n in range(1, int(total) + 1)])
    return found


def _check_shards(path: Path, names: list[str]) -> None:
    missing = [name for name in dict.fromkeys(names) if not (path / name).is_file()]
    if missing:
        of = f", with {sum(name in missing for name in names)} tensors" if len(names) > len(set(names)) else ""
        raise CheckpointError(
            "every shard of the weights must be there",
            f"no {', '.join(missing)}{of}, in {path}",
            "Download what is missing",
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
    command = CONVERSION.format(file=pickles[0], target=targets[0])
    more = "" if len(pickles) == 1 else f", and so for the other {len(pickles) - 1} files"
    return CheckpointError(
        "weights must be in safetensors files: a pickle can run any program when it is opened",
        f"{', '.join(pickles)} in {path}",
        f'Take a release with *.safetensors, or convert it where you trust it: python -c "{command}"{more}',
    )
