"""One run of a comparison: trained by `mtp train` in a process of its own, to its end or on from where it was."""

import ctypes
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from mtp_lightning.bench.adapt_plan import PlannedRun
from mtp_lightning.checkpoint.format.folder import CheckpointFolder, complete_checkpoints
from mtp_lightning.launch.signals import INTERRUPTED, REQUEUE, heeded_signals
from mtp_lightning.recipe import Recipe
from mtp_lightning.training.health.early_stop import is_over
from mtp_lightning.training.run_folder import check_changes

TAIL_LINES = 200
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def newest(stage: Recipe) -> CheckpointFolder | None:
    """Return the last checkpoint of a stage."""
    return next(reversed(complete_checkpoints(Path(stage.run.dir) / "checkpoints")), None)


def is_finished(run: PlannedRun) -> bool:
    """Tell whether every stage of a run has reached its end."""
    found = [(stage, newest(stage)) for stage in run.stages]
    return all(checkpoint is not None and is_over(stage, checkpoint) for stage, checkpoint in found)


def check_begun(run: PlannedRun) -> None:
    """Refuse to go on with a run of another recipe.

    Raises:
        RunFolderError: Its folder holds one.
    """
    for stage in run.stages:
        if newest(stage) is not None:
            check_changes(Path(stage.run.dir), stage)


def train_run(run: PlannedRun) -> str | None:
    """Train a run to its end; return why it failed, or None.

    All that it says goes to stderr, so that stdout is the table alone. Signals are passed on to it, a second one kills
    it; it dies with this process, however this one dies.

    Raises:
        KeyboardInterrupt: It was interrupted.
        SystemExit: It was asked to stop, with the code that asks for a requeue.
    """
    libc = ctypes.CDLL(None)
    sys.stderr.flush()
    process = subprocess.Popen(
        [sys.executable, "-m", "mtp_lightning", "train", *run.arguments],
        stdin=subprocess.DEVNULL,
        stdout=2,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
        preexec_fn=lambda: libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL),
    )
    with _signals_passed_on(process) as heard, process:
        assert process.stderr is not None
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        for line in process.stderr:
            tail.append(line.decode(errors="replace"))
            sys.stderr.write(tail[-1])
            sys.stderr.flush()
    code = process.returncode
    if signal.SIGINT in heard or code == INTERRUPTED:
        raise KeyboardInterrupt
    if heard or code == REQUEUE:
        raise SystemExit(REQUEUE)
    return reason_of(code, list(tail)) if code else None


@contextmanager
def _signals_passed_on(process: "subprocess.Popen[bytes]") -> Iterator[list[int]]:
    """Send signals of this process to another one; yield a list of those that have come."""
    heard: list[int] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        process.send_signal(signal.SIGKILL if heard else signum)
        heard.append(signum)

    former = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGINT, *heeded_signals())}
    try:
        yield heard
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)


def reason_of(code: int, lines: Sequence[str]) -> str:
    r"""Say in one line why a process failed, from its exit code and what it said last.

    >>> reason_of(5, ["error: the loss must be finite\n", "  found    nan\n", "  hint   Lower it.\n"])
    'the loss must be finite; found nan'
    >>> reason_of(1, ["Traceback\n", "ValueError: x\n"]), reason_of(-9, [])
    ('exit code 1: ValueError: x', 'killed by SIGKILL')
    """
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    said = [line.strip() for line in lines if line.strip()]
    begins = [index for index, line in enumerate(said) if line.startswith("error: ")]
    if not begins:
        return f"exit code {code}: {said[-1] if said else 'no message'}"
    headline, *parts = said[begins[-1] :]
    if "to correct" in headline and parts:  # of a recipe: what is wrong is the next line
        headline, *parts = parts
    found = next((part.removeprefix("found").strip() for part in parts if part.startswith("found ")), "")
    return f"{headline.removeprefix('error: ')}; found {found}" if found else headline.removeprefix("error: ")
