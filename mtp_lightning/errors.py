"""The vocabulary of failure: every error says what must hold, what was found, and what to do."""

from dataclasses import dataclass
from typing import Any, ClassVar


class MtpError(Exception):
    """Base of all failures that a user can cause or cure; the command line prints it without a traceback."""

    exit_code: ClassVar[int] = 1

    def __init__(self, must_hold: str, found: str, remedy: str) -> None:
        self.must_hold = must_hold
        self.found = found
        self.remedy = remedy
        super().__init__(f"{must_hold}; found {found}. {remedy}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross process borders (loader workers) as what it is."""
        return type(self), (self.must_hold, self.found, self.remedy)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing wrong with a recipe."""

    path: str  # dotted path of the field, e.g. "heads.num_offsets"
    must_hold: str
    found: str
    origin: str  # "recipes/x.yaml:14", "command line" or "default"
    nearest: str | None = None  # nearest valid name, for a misspelt key or choice
    remedy: str


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

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross process borders with all faults."""
        return type(self), (self.faults,)


class DataError(MtpError):
    """Shards, tokens or text that cannot be trained on."""

    exit_code = 87


class CheckpointError(MtpError):
    """A checkpoint that cannot be written, read or resumed from."""

    exit_code = 3


class RunFolderError(MtpError):
    """A run folder that belongs to another recipe or another job."""

    exit_code = 4


class LaunchError(MtpError):
    """Processes that cannot be started, or do not know which rank they are."""

    exit_code = 6


class SiteError(LaunchError):
    """A description of a cluster that cannot be used."""

    exit_code = 8


class BadNodeError(LaunchError):
    """A machine that should not be trained on."""

    exit_code = 86


class TrainingError(MtpError):
    """Training reached a state that it must not go on from."""

    exit_code = 5


class NonFiniteError(TrainingError):
    """A loss, gradient or weight is not finite."""

    exit_code = 88


class DecodingError(MtpError):
    """Prompts or settings that a model cannot generate with."""

    exit_code = 7
