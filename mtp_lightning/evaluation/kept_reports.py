"""Reports of runs, each kept in the run's folder, where `mtp report compare` finds it and nothing is computed again."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from mtp_lightning.checkpoint.format.folder import open_checkpoint
from mtp_lightning.checkpoint.format.manifest import MANIFEST_NAME
from mtp_lightning.console.progress import say
from mtp_lightning.errors import RunFolderError, refusal_of
from mtp_lightning.evaluation.marginal import MarginalReport
from mtp_lightning.evaluation.probes import PROBES, ProbeReport
from mtp_lightning.files.durable import replace_durably
from mtp_lightning.files.untrusted import MOST_JSON_BYTES, OddFileError, read_bounded, reason_of
from mtp_lightning.launch.run_marker import is_run

Report = TypeVar("Report")


@dataclass(frozen=True)
class Kept(Generic[Report]):
    """A report, and what was asked."""

    manifest_sha256: str  # of the checkpoint
    settings: dict[str, int | float | str]
    report: Report


@dataclass(frozen=True)
class Keeper(Generic[Report]):
    """Keeps what one verb of `mtp eval` finds out."""

    verb: str
    format: TypeAdapter[Kept[Report]]

    @property
    def file_name(self) -> str:
        """Name of the file in a run folder."""
        return f"{self.verb}.json"

    def measured(self, path: Path, settings: Mapping[str, float | str], measure: Callable[[], Report]) -> Report:
        """Return what `measure` gives of a model, which raises; of a run folder it is kept, and measured once."""
        if not is_run(path):
            return measure()
        digest, kept = _digest_of(path), self._read(path)
        if kept is None or (kept.manifest_sha256, kept.settings) != (digest, settings):
            kept = Kept(digest, dict(settings), measure())
            self._keep(path / self.file_name, self.format.dump_json(kept, indent=2) + b"\n")
        return kept.report

    def _keep(self, path: Path, content: bytes) -> None:
        """Write a report; where that cannot be it is said, for what was measured can still be shown."""
        try:
            replace_durably(path, content)
        except OSError as error:
            say(f"mtp report compare will not show these figures: {refusal_of(error, path)}", stderr=True)

    def read(self, run: Path) -> Report | None:
        """Read what was measured of a run; None where nothing was.

        Raises:
            RunFolderError: It cannot be read, or is of another checkpoint than the run's last one.
        """
        kept = self._read(run)
        if kept is not None and kept.manifest_sha256 != _digest_of(run):
            raise RunFolderError(
                f"{self.file_name} must be of the run's last checkpoint",
                f"an earlier one's in {run}",
                f"Measure again: mtp eval {self.verb} {run}",
            )
        return None if kept is None else kept.report

    def _read(self, run: Path) -> Kept[Report] | None:
        path = run / self.file_name
        try:
            return self.format.validate_json(read_bounded(path, MOST_JSON_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, OddFileError, ValidationError) as error:
            what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else reason_of(error)
            expected = f"{self.file_name} must be what `mtp eval {self.verb}` wrote"
            raise RunFolderError(expected, f"{what}, in {path}", "Remove it") from None


MARGINAL = Keeper("marginal", TypeAdapter(Kept[MarginalReport]))
OF_PROBES = {probe: Keeper(probe, TypeAdapter(Kept[ProbeReport])) for probe in PROBES}


def _digest_of(run: Path) -> str:
    return hashlib.sha256((open_checkpoint(run, verify=False).path / MANIFEST_NAME).read_bytes()).hexdigest()
