"""What one run of a comparison reached, measured on the same positions as the others', and kept beside the run."""

import gc
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mtp_lightning.bench.adapt_plan import PlannedRun
from mtp_lightning.checkpoint.format.folder import open_checkpoint
from mtp_lightning.errors import DataError
from mtp_lightning.evaluation.marginal import LEAST_PREFIX_TOKENS, held_out_texts, measure_marginal
from mtp_lightning.files.durable import replace_durably
from mtp_lightning.recipe import Recipe

FILE_NAME = "marginal.json"


@dataclass(frozen=True)
class Settings:
    """How to measure, as `mtp eval marginal` is told."""

    num_offsets: int
    num_samples: int
    last_tokens: int
    top: int
    nucleus: float
    most_paths: int
    device: str


@dataclass(frozen=True)
class Measured:
    """A run's figures, or why there are none."""

    run: PlannedRun
    checkpoint: str | None = None  # beneath the comparison's folder
    report: dict[str, Any] | None = None  # as `MarginalReport.as_json` gives it
    failure: str | None = None


def digest_of_texts(runs: Sequence[PlannedRun], settings: Settings) -> str:
    """Build the data of all runs, and check that all are measured on the same texts; return their digest.

    Raises:
        DataError: They are not, or none of them is long enough.
    """
    digests: dict[str, str] = {}
    named: dict[str, PlannedRun] = {}
    for run in runs:
        recipe = run.stages[-1]
        if (key := _key_of_texts(recipe)) not in digests:
            texts = held_out_texts(recipe, settings.num_samples, LEAST_PREFIX_TOKENS + settings.last_tokens)
            digests[key] = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        named.setdefault(digests[key], run)
    if len(named) > 1:
        raise DataError(
            "all recipes of a comparison must be measured on the same held-out texts",
            f"other ones for {' than for '.join(run.title for run in named.values())}",
            "Give data.* and heads.num_offsets on the command line, where they hold for all recipes",
        )
    return next(iter(named))


def _key_of_texts(recipe: Recipe) -> str:
    """Spell all that texts depend on, so that they are looked up once for recipes that agree in it."""
    parts = (recipe.model.vocab_size, recipe.heads.num_offsets, recipe.run.cache, recipe.run.seed)
    return json.dumps([recipe.data.model_dump(mode="json"), *parts])


def measure_run(run: PlannedRun, settings: Settings, texts_digest: str) -> Measured:
    """Measure the last checkpoint of a finished run, or read what was measured of it under the same settings.

    Raises:
        CheckpointError: It cannot be read.
    """
    checkpoint = open_checkpoint(run.folder, verify=False)
    name = str(checkpoint.path.relative_to(run.folder.parent.resolve()))
    asked = {
        "checkpoint": name,
        "manifest_sha256": checkpoint.sha256,
        "texts_sha256": texts_digest,
        "settings": asdict(settings),
    }
    path = run.folder / FILE_NAME
    report = _kept(path, asked)
    if report is None:
        report = _measured(checkpoint.path, settings)
        replace_durably(path, json.dumps({"of": asked, "report": report}, indent=2).encode() + b"\n")
    return Measured(run, name, report)


def _kept(path: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Read an earlier report, if it answers the same question."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content["report"] if isinstance(content, dict) and content.get("of") == asked else None


def _measured(checkpoint: Path, settings: Settings) -> dict[str, Any]:
    report = measure_marginal(checkpoint, **asdict(settings)).as_json()
    gc.collect()
    if settings.device != "cpu":
        torch.cuda.empty_cache()  # the next run trains in another process, which needs the memory
    plain: dict[str, Any] = json.loads(json.dumps(report))  # as it is read again
    return plain
