"""Marginalization measured of runs and kept beside them, where `mtp report compare` finds it."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mtp_lightning.checkpoint.format.folder import open_checkpoint
from mtp_lightning.checkpoint.format.manifest import MANIFEST_NAME
from mtp_lightning.errors import RunFolderError
from mtp_lightning.evaluation.marginal import MarginalReport, measure_marginal
from mtp_lightning.files.durable import replace_durably
from mtp_lightning.files.untrusted import MOST_JSON_BYTES, OddFileError, read_bounded, reason_of
from mtp_lightning.launch.run_marker import is_run

FILE_NAME = "marginal.json"


@dataclass(frozen=True)
class Kept:
    """A report, and what was asked."""

    manifest_sha256: str  # of the checkpoint
    settings: dict[str, float]
    report: MarginalReport


FORMAT = TypeAdapter(Kept)


def measure_kept(path: Path, *, device: str, **settings: Any) -> MarginalReport:
    """Return `measure_marginal` of a model, which raises; of a run folder it is kept, and measured once."""
    if not is_run(path):
        return measure_marginal(path, device=device, **settings)
    digest, kept = _digest_of(path), _read(path)
    if kept is None or (kept.manifest_sha256, kept.settings) != (digest, settings):
        kept = Kept(digest, settings, measure_marginal(path, device=device, **settings))
        replace_durably(path / FILE_NAME, FORMAT.dump_json(kept, indent=2) + b"\n")
    return kept.report


def read_kept(run: Path) -> MarginalReport | None:
    """Read what was measured of a run; None where nothing was.

    Raises:
        RunFolderError: It cannot be read, or is of another checkpoint than the run's last one.
    """
    kept = _read(run)
    if kept is not None and kept.manifest_sha256 != _digest_of(run):
        raise RunFolderError(
            f"{FILE_NAME} must be of the run's last checkpoint",
            f"an earlier one's in {run}",
            f"Measure again: mtp eval marginal {run}",
        )
    return None if kept is None else kept.report


def _read(run: Path) -> Kept | None:
    try:
        return FORMAT.validate_json(read_bounded(run / FILE_NAME, MOST_JSON_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, OddFileError, ValidationError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else reason_of(error)
        raise RunFolderError(
            f"{FILE_NAME} must be what `mtp eval marginal` wrote", f"{what}, in {run / FILE_NAME}", "Remove it"
        ) from None


def _digest_of(run: Path) -> str:
    return hashlib.sha256((open_checkpoint(run, verify=False).path / MANIFEST_NAME).read_bytes()).hexdigest()
