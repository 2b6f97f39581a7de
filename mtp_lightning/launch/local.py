"""Ranks of one machine: started together, stopped together, heard as one."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

from mtp_lightning.errors import LaunchError, visible
from mtp_lightning.launch.rank_env import RankInfo, free_port, local_rank_info, rank_from_env
from mtp_lightning.launch.signals import heeded_signals
from mtp_lightning.recipe.schema.root import Recipe

_LIBC = ctypes.CDLL(None)
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def start_mtp(
    arguments: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    stdout: IO[bytes] | int | None = None,
    stderr: IO[bytes] | int | None = None,
) -> "subprocess.Popen[bytes]":
    """Start `mtp` with these arguments; it is killed when this process ends, however it ends."""
    return subprocess.Popen(
        [sys.executable, "-m", "mtp_lightning", *arguments],
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
        preexec_fn=die_with_parent,
    )


def run_to_end(command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a command as `subprocess.run` does, and return what it said, whatever its code; it ends with this process."""
    return subprocess.run(command, text=True, check=False, capture_output=True, preexec_fn=die_with_parent, **options)


def shell_code(code: int) -> int:
    """Return an exit code as a shell gives it: 128 + signal for a killed process."""
    return code if code >= 0 else 128 - code


def die_with_parent() -> None:
    """Let the kernel kill this process when the one that has started it ends, however it ends."""
    _LIBC.prctl(_DIE_WITH_PARENT, signal.SIGKILL)


@contextmanager
def signals_passed_on(processes: Sequence["subprocess.Popen[bytes]"]) -> Iterator[list[int]]:
    """Send interrupts and stop signals of this process to all of them; yield a list of those that have come.

    What this process ignores the others ignore too.
    """
    heard: list[int] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        heard.append(signum)
        for process in processes:
            if process.poll() is None:
                process.send_signal(signum)

    former = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGINT, *heeded_signals())}
    try:
        yield heard
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)


GRACE_S = 10.0  # for the other ranks to end by themselves when one has failed, and again until they are killed
PAUSE_S = 0.02
TAIL_BYTES = 8_000


def needs_ranks(recipe: Recipe, environment: Mapping[str, str]) -> bool:
    """Tell whether this process has to start the recipe's ranks before it can train.

    Raises:
        LaunchError: The recipe's ranks are on several nodes, which only a cluster's launcher can start.
    """
    if recipe.strategy.num_ranks == 1 or rank_from_env(environment) is not None:
        return False
    if recipe.strategy.num_nodes > 1:
        nodes, ranks = recipe.strategy.num_nodes, recipe.strategy.ranks_per_node
        raise LaunchError(
            f"the ranks of {nodes} nodes must be started by srun or torchrun, one process per rank",
            "a single process",
            f"Use srun --nodes={nodes} --ntasks-per-node={ranks} mtp train …, or set strategy.num_nodes=1",
        )
    return True


@dataclass(frozen=True)
class _Rank:
    rank_info: RankInfo
    process: "subprocess.Popen[bytes]"
    log: IO[bytes] | None  # of all ranks but the first, whose output is the run's

    @property
    def exit_code(self) -> int | None:
        """As a shell gives it."""
        code = self.process.poll()
        return None if code is None else shell_code(code)


def run_ranks(recipe: Recipe, arguments: Sequence[str]) -> int:
    """Run `mtp` with these arguments as every rank of a recipe on this machine; return the exit code of the run.

    The first rank has the terminal. When a rank fails the others are stopped, and what it had said is shown if the
    first rank has not failed in the same way. Ranks die with this process, however it dies.
    """
    port, num_ranks = free_port(), recipe.strategy.ranks_per_node
    with ExitStack() as until_the_end:
        ranks = [_start(local_rank_info(rank, num_ranks, port), arguments, until_the_end) for rank in range(num_ranks)]
        with signals_passed_on([rank.process for rank in ranks]):
            failed = _await(ranks)
            if failed is None:
                return 0
            _stop(ranks)
        code = failed.exit_code or 1
        if failed.log is not None and ranks[0].exit_code != code:
            print(f"Rank {failed.rank_info.rank} of {num_ranks} ended with exit code {code}:", file=sys.stderr)
            sys.stderr.write(_tail(failed.log))
        return code


def _start(rank_info: RankInfo, arguments: Sequence[str], until_the_end: ExitStack) -> _Rank:
    log: IO[bytes] | None = None
    if rank_info.rank:
        log = until_the_end.enter_context(tempfile.TemporaryFile())  # noqa: SIM115, the stack is its context
    threads = max(1, len(os.sched_getaffinity(0)) // rank_info.local_ranks)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, **rank_info.environment}
    process = start_mtp(arguments, environment=environment, stdout=log, stderr=log)
    return _Rank(rank_info, process, log)


def _await(ranks: list[_Rank]) -> _Rank | None:
    """Wait until all ranks have ended well, or return the first that has not."""
    while True:
        codes = [rank.exit_code for rank in ranks]
        failed = next((rank for rank, code in zip(ranks, codes, strict=True) if code), None)
        if failed is not None or None not in codes:
            return failed
        time.sleep(PAUSE_S)


def _stop(ranks: list[_Rank]) -> None:
    """Let the ranks end by themselves, then ask them to, then make them."""
    for insist in (None, signal.SIGTERM, signal.SIGKILL):
        for rank in ranks:
            if insist is not None and rank.process.poll() is None:
                rank.process.send_signal(insist)
        until = time.monotonic() + GRACE_S
        while any(rank.process.poll() is None for rank in ranks) and time.monotonic() < until:
            time.sleep(PAUSE_S)


def _tail(log: IO[bytes]) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - TAIL_BYTES))
    return visible(log.read().decode(errors="replace"))
