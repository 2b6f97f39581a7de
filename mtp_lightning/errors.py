"""The vocabulary of failure: every error says what must hold, what was found, and what to do."""

import errno
import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls of terminals, of lines and of the direction of writing, and surrogates (bytes that are no text)."""

_CHECKPOINT = re.compile(r".*/checkpoints/step-\d{8,}(?=/|$)", re.DOTALL)

LONGEST = 1000
"""Most characters that one part of a fault shows."""


def visible(text: str, *, kept: str = "\n\t") -> str:
    r"""Write characters that would change the screen, or cannot be printed, as their escapes.

    >>> print(visible("\x1b[2J\u202eab\udcff"))
    \x1b[2J\u202eab\udcff
    """
    return _UNSEEN.sub(lambda found: found[0] if found[0] in kept else ascii(found[0])[1:-1], text)


class MtpError(Exception):
    """Base of all failures that a user can cause or cure; the command line prints it without a traceback."""

    exit_code: ClassVar[int] = 1

    def __init__(self, expected: str, found: str, hint: str) -> None:
        self.expected = visible(expected)
        self.found = visible(found)
        self.hint = visible(hint)
        super().__init__(f"{self.expected}; found {self.found}. {self.hint}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross process borders (loader workers) as what it is."""
        return type(self), (self.expected, self.found, self.hint)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing wrong with a recipe."""

    path: str  # dotted path of the field, e.g. "heads.num_offsets"
    expected: str
    found: str
    origin: str  # "recipes/x.yaml:14", "command line" or "default"
    nearest: str | None = None  # nearest valid name, for a misspelt key or choice
    hint: str

    def __post_init__(self) -> None:
        for name, text in vars(self).items():
            if isinstance(text, str):
                shown = text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} characters)"
                object.__setattr__(self, name, visible(shown))  # frozen


class RecipeError(MtpError):
    """A recipe with one or more faults; carries all of them."""

    exit_code = 2

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults
        noun = "fault" if len(faults) == 1 else "faults"
        super().__init__(
            "a recipe must be valid as a whole",
            f"{len(faults)} {noun} ({', '.join(fault.path for fault in faults)})",
            "Correct each as listed",
        )

    def __str__(self) -> str:
        """Tell all faults, as a traceback or a notebook shows them."""
        told = (f"{one.path} {one.expected}; found {one.found} ({one.origin}). {one.hint}" for one in self.faults)
        return "\n".join((super().__str__(), *told))

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross process borders with all faults."""
        return type(self), (self.faults,)


class FileSystemError(MtpError):
    """A file system that does not take what is written, or give what is read."""

    exit_code = 10


_CURES = {
    errno.ENOSPC: "Make room there",
    errno.EDQUOT: "Make room within your quota",
    errno.EFBIG: "Raise the limit of this shell (ulimit -f)",
}
_REMEDIES = {
    errno.EIO: "The storage fails: look at the kernel's log, and name another place",
    errno.ESTALE: "The network file system has lost it: start again where it is mounted afresh",
}


def removed_checkpoint(path: str | os.PathLike[str]) -> "CheckpointError | None":
    """Say that a checkpoint, or one that a file was in, has been removed; None if it is there, or never was one."""
    match = _CHECKPOINT.match(os.fspath(path))
    if match is None or os.path.lexists(match[0]):
        return None
    return CheckpointError(
        "a checkpoint must stay while it is read",
        f"{match[0]} is gone: a run that goes on keeps its last ones only",
        "Give the same command again, which takes the newest of the run; or raise checkpoint.keep",
    )


def file_system_error(error: OSError) -> MtpError:
    """Say what a refusal of the system means, wherever it came from.

    >>> file_system_error(OSError(errno.EDQUOT, "Disk quota exceeded", "runs/a")).hint
    'Make room within your quota, or name another place'
    """
    if error.errno in (errno.ENOENT, errno.ESTALE) and (removed := removed_checkpoint(str(error.filename))):
        return removed
    cure = _CURES.get(error.errno or 0, "Repair access to it")
    remedy = _REMEDIES.get(error.errno or 0, f"{cure}, or name another place")
    return FileSystemError("files must be readable and writable", refusal_of(error), remedy)


def remedy_of(error: OSError, option: str) -> str:
    """Say what to do about a file that an option names and the system refuses."""
    cure = _CURES.get(error.errno or 0)
    return f"{f'{cure}, or give' if cure else 'Give'} another path to {option}"


def refusal_of(error: OSError, place: Path | None = None) -> str:
    """Say what the system refused, where, and of a place that is full what is left there.

    Args:
        error: the refusal.
        place: where it was written to, if the refusal does not name a file itself.
    """
    names = (error.filename2, error.filename, place)  # the second is a number where a descriptor was written to
    where = next((os.fsdecode(name) for name in names if isinstance(name, str | bytes | Path)), None)
    left = _left_at(Path(where)) if where is not None and error.errno == errno.ENOSPC else ""
    if error.errno == errno.EFBIG and (limit := resource.getrlimit(resource.RLIMIT_FSIZE)[0]) != resource.RLIM_INFINITY:
        left = f" (a file may have at most {limit:,} bytes, by ulimit -f)"
    return f"{'' if where is None else f'{where}: '}{error.strerror or error}{left}"


def _left_at(place: Path) -> str:
    """Say what is left where a file was to be written: bytes, or names of files, which can be used up before them."""
    try:
        if place.exists() and not place.is_file() and not place.is_dir():
            return ""  # a device or a pipe
        at = os.statvfs(next(folder for folder in (place, *place.absolute().parents) if folder.is_dir()))
    except (OSError, StopIteration):
        return ""
    if at.f_files and not at.f_favail:
        return f" (no inode is free there: it holds {at.f_files:,} files and folders, and takes no other)"
    return f" ({at.f_bavail * at.f_frsize / 2**20:,.1f} MiB free there)"


class DataError(MtpError):
    """Shards, tokens or text that cannot be trained on."""

    exit_code = 87


class CheckpointError(MtpError):
    """A checkpoint that cannot be written, read or resumed from."""

    exit_code = 3


class RunFolderError(MtpError):
    """A run folder that belongs to another recipe or another job."""

    exit_code = 4


class LoaderError(MtpError):
    """A process that loads data has been killed."""

    exit_code = 11


class LaunchError(MtpError):
    """Processes that cannot be started, or do not know which rank they are."""

    exit_code = 6


class SiteError(LaunchError):
    """A description of a cluster that cannot be used."""

    exit_code = 8


class BadNodeError(LaunchError):
    """A machine that should not be trained on."""

    exit_code = 86


class LoggingError(MtpError):
    """A logger that a run cannot log to."""

    exit_code = 9


class TrainingError(MtpError):
    """Training reached a state that it must not go on from."""

    exit_code = 5


class NonFiniteError(TrainingError):
    """A loss, gradient or weight is not finite."""

    exit_code = 88


class DecodingError(MtpError):
    """Prompts or settings that a model cannot generate with."""

    exit_code = 7


class SandboxError(MtpError):
    """Generated code that cannot be run where it does no harm."""

    exit_code = 12
