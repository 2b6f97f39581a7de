"""What an exported folder says about itself: config.json beside model.safetensors and recipe.yaml."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from mtp_lightning import __version__
from mtp_lightning.checkpoint.format.manifest import DamagedCheckpointError
from mtp_lightning.files.durable import FileRecord, write_durably
from mtp_lightning.recipe import Recipe, num_head_layers, num_trunk_layers, recipe_hash

CONFIG_NAME = "config.json"
DtypeName = Literal["fp32", "bf16", "fp16"]


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
    """
    path = folder / CONFIG_NAME
    try:
        return ExportConfig.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        found = f"none in {folder}"
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(map(str, first['loc'])) or 'its text'}: {first['msg']}, in {path}"
    raise DamagedCheckpointError(
        "an exported folder must have a config.json of mtp_lightning's consolidated format, version 1",
        found,
        "Export it again: mtp export CHECKPOINT --out FOLDER",
    )


class Provenance(NamedTuple):
    """What an exported folder says of where its weights come from."""

    step: int
    tokens: int
    sha256: str  # of the manifest, or of whatever else describes the source

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
        recipe_hash=recipe_hash(recipe),
        source_manifest_sha256=provenance.sha256,
        files=dict(files),
    )
    write_durably(folder / CONFIG_NAME, config.model_dump_json(indent=2).encode() + b"\n")
