"""What a complete checkpoint says about itself."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.durable import FileRecord

MANIFEST_NAME = "MANIFEST.json"
RECIPE_NAME = "recipe.yaml"
FORMAT_VERSION = 2


class DamagedCheckpointError(CheckpointError):
    """A checkpoint whose content is not what was committed; an older one may still be good."""


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What stays the same over a run and goes into every manifest."""

    recipe_hash: str
    num_offsets: int
    layers: Mapping[str, int]  # e.g. {"trunk": 5, "heads": 3}
    world_size: int = 1
    strategy: str = "single"  # single, zero1, zero2 or zero3: who held what; any other can read the checkpoint
    recipe_text: str = ""  # the resolved recipe as YAML; goes into every checkpoint as recipe.yaml, unless empty


@dataclass(frozen=True, kw_only=True)
class Moment:
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


def read_manifest(checkpoint: Path) -> Manifest:
    """Parse the manifest of a checkpoint folder.

    Raises:
        DamagedCheckpointError: the manifest is missing or is not one.
        CheckpointError: it was written in another format than this version reads.
    """
    path = checkpoint / MANIFEST_NAME
    try:
        content = json.loads(path.read_bytes())
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
