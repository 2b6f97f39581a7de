"""Descriptions of checkpoints (MANIFEST.json) and of exported folders (config.json)."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from mtp_lightning import __version__
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.durable import FileRecord, write_durably
from mtp_lightning.files.untrusted import OddFileError, read_json, read_object
from mtp_lightning.recipe import Recipe, num_head_layers, num_trunk_layers, recipe_hash

MANIFEST_NAME = "MANIFEST.json"
RECIPE_NAME = "recipe.yaml"
FORMAT_VERSION = 2
CONFIG_NAME = "config.json"
DtypeName = Literal["fp32", "bf16", "fp16"]


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose content is not what was committed; an older one may still be good."""


@dataclass(frozen=True, kw_only=True)
class RunMetadata:
    """What stays the same over a run and goes into every manifest."""

    recipe_hash: str
    num_offsets: int
    layers: Mapping[str, int]  # e.g. {"trunk": 5, "heads": 3}
    world_size: int = 1
    strategy: str = "single"  # single, zero1, zero2 or zero3: who held what; any other can read the checkpoint
    recipe_text: str = ""  # the resolved recipe as YAML; goes into every checkpoint as recipe.yaml, unless empty


@dataclass(frozen=True, kw_only=True)
class SavePoint:
    """Where in a run a checkpoint was taken."""

    step: int
    tokens: int
    metrics: Mapping[str, float] = field(default_factory=dict)  # validation at this very step, where there was one


class Manifest(BaseModel):
    """Content of MANIFEST.json; written last, so its presence means that everything else is in place."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["mtp_lightning checkpoint"] = "mtp_lightning checkpoint"
    format_version: int = FORMAT_VERSION
    package_version: str
    created_at: str  # ISO 8601, UTC
    step: int
    tokens: int
    recipe_hash: str
    head_numbering: Literal["offsets (next token included)"] = "offsets (next token included)"
    num_offsets: int
    layers: dict[str, int]
    world_size: int
    strategy: str
    metrics: dict[str, float]
    files: dict[str, FileRecord]


def read_description(folder: Path) -> "Manifest | ExportConfig | None":
    """Parse what a folder says about itself; None where it is neither a checkpoint nor an exported folder.

    Raises:
        CheckpointError: it says something else.
    """
    if (folder / MANIFEST_NAME).is_file():
        return read_manifest(folder)
    return read_config(folder) if (folder / CONFIG_NAME).is_file() else None


def read_manifest(checkpoint: Path) -> Manifest:
    """Parse the manifest of a checkpoint folder.

    Raises:
        DamagedCheckpointError: the manifest is missing or is not one.
        CheckpointError: it was written in another format than this version reads.
    """
    path = checkpoint / MANIFEST_NAME
    try:
        content = read_json(path)
    except FileNotFoundError:
        raise DamagedCheckpointError(
            "a complete checkpoint has a MANIFEST.json", f"none in {checkpoint}", "Name a complete checkpoint"
        ) from None
    except OSError as error:
        raise CheckpointError(
            "the manifest of a checkpoint must be readable",
            f"{error.strerror} for {path}",
            "Repair access to it",
        ) from None
    except ValueError as error:
        raise _unreadable(path, str(error)) from None
    _check_version(content, path)
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise _unreadable(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _check_version(content: Any, path: Path) -> None:
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        writer = f", written by mtp_lightning {content.get('package_version', 'of unknown version')}"
        raise CheckpointError(
            f"the format version of a checkpoint must be {FORMAT_VERSION}",
            f"{version} in {path}{writer}",
            "Upgrade mtp_lightning"
            if version > FORMAT_VERSION
            else "Use the version that wrote it, or start over with run.restart=true",
        )


def _unreadable(path: Path, what: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        "the manifest of a checkpoint must be as it was written",
        f"{what} in {path}",
        "Use another checkpoint",
    )


class ExportConfig(BaseModel):
    """Content of config.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal["mtp_lightning consolidated"] = "mtp_lightning consolidated"
    format_version: Literal[1] = 1
    package_version: str
    model: dict[str, Any]  # the recipe's section
    heads: dict[str, Any]  # the recipe's section
    head_numbering: Literal["offsets (next token included)"] = "offsets (next token included)"
    num_offsets: int
    layers: dict[str, int]
    step: int
    tokens: int
    dtype: DtypeName
    recipe_hash: str
    source_manifest_sha256: str
    files: dict[str, FileRecord]


def read_config(folder: Path) -> ExportConfig:
    """Parse the config.json of an exported folder.

    Raises:
        DamagedCheckpointError: it is missing, or is not one of this format.
        CheckpointError: it is that of a model of transformers.
    """
    path = folder / CONFIG_NAME
    try:
        return ExportConfig.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        found = f"none in {folder}"
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(map(str, first['loc'])) or 'its text'}: {first['msg']}, in {path}"
        if _is_transformers(path):
            raise CheckpointError(
                "the model must be one of mtp_lightning",
                f"a folder as transformers writes it, {folder}",
                f"Import it first: mtp import {folder} --out NEW",
            ) from None
    raise DamagedCheckpointError(
        "an exported folder must have a config.json of mtp_lightning's consolidated format, version 1",
        found,
        "Export it again: mtp export CHECKPOINT --out FOLDER",
    )


def _is_transformers(path: Path) -> bool:
    """Say whether settings are those of a model of transformers."""
    try:
        values = read_object(path)
    except (OSError, OddFileError):
        return False
    return "format" not in values and any(name in values for name in ("model_type", "architectures"))


class Provenance(NamedTuple):
    """What an exported folder says of where its weights come from."""

    step: int
    tokens: int
    sha256: str  # of the manifest, or of whatever else describes the source
    recipe_hash: str | None = None  # of the recipe that the weights were trained by; None: the folder's own

    @classmethod
    def of_file(cls, path: Path) -> "Provenance":
        """Take a file that describes weights which were not trained here."""
        return cls(0, 0, hashlib.sha256(path.read_bytes()).hexdigest())


def write_config(
    folder: Path, recipe: Recipe, provenance: Provenance, files: Mapping[str, FileRecord], *, dtype: DtypeName
) -> None:
    """Write the config.json of a folder whose files are there."""
    config = ExportConfig(
        package_version=__version__,
        model=recipe.model.model_dump(mode="json"),
        heads=recipe.heads.model_dump(mode="json"),
        num_offsets=recipe.heads.num_offsets,
        layers={"trunk": num_trunk_layers(recipe), "heads": num_head_layers(recipe)},
        step=provenance.step,
        tokens=provenance.tokens,
        dtype=dtype,
        recipe_hash=provenance.recipe_hash or recipe_hash(recipe),
        source_manifest_sha256=provenance.sha256,
        files=dict(files),
    )
    write_durably(folder / CONFIG_NAME, config.model_dump_json(indent=2).encode() + b"\n")
