"""What an exported folder says about itself: config.json beside model.safetensors and recipe.yaml."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mtp_lightning.checkpoint.manifest import DamagedCheckpointError, FileRecord

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
