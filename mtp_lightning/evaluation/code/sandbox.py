"""Runs generated code where it can do no harm, and says whether it passes its tests."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

from mtp_lightning.errors import SandboxError
from mtp_lightning.evaluation.code.inside.frames import ClosedError, receive, send
from mtp_lightning.evaluation.code.inside.walls import NOBODY, SYSTEM

HOME = str(Path(__file__).resolve().parents[3])
START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from mtp_lightning.evaluation.code.inside.referee import main; main()"
)
FLAGS = ("-S", "-s", "-P", "-B", "-X", "utf8")
ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Sets have one order, and libraries start no threads; the code sees an empty one."""
START_S = 30.0  # for a sandbox to be built on a machine that is busy
MIB = 1 << 20
TRIAL = (
    "import heapq\ndef f():\n    return 1\n"  # fails where the user nobody, that root's code runs as, cannot read it
)


@final
@dataclass(frozen=True, kw_only=True)
class Limits:
    """What generated code may use."""

    seconds: float = 10.0  # of wall clock for all tests of one sample, or for one run of a program
    memory_mib: int = 1024  # address space of each process
    file_mib: int = 32  # of each file, of all files together, and of what a program prints
    processes: int = 16  # and threads, the referee's included


@final
@dataclass(frozen=True)
class Calls:
    """Tests that call functions of the code."""

    source: str  # of the tests, which raise if one fails
    names: Sequence[str]  # what the code must define
    before: str = ""  # source that the tests rely on, such as helpers in the prompt


@final
@dataclass(frozen=True)
class Programs:
    """Runs of the code as a program: what it reads, and what it must print, up to white space."""

    cases: Sequence[tuple[str, str]]


class Verdict(NamedTuple):
    """What became of one sample."""

    outcome: Literal["passed", "failed", "timeout"]
    why: str


@final
class Sandbox:
    """Runs samples, each in processes and namespaces of its own; may be used by several threads."""

    def __init__(self, limits: Limits | None = None, *, weak: bool = False) -> None:
        """Try it once.

        Args:
            limits: What the code may use.
            weak: Do without namespaces: limits and the filter of system calls remain, but the code sees the files and
                processes that the user sees.

        Raises:
            SandboxError: The kernel refuses a part of it.
        """
        self.limits, self.is_weak = limits or Limits(), weak
        self._running: set[subprocess.Popen[bytes]] = set()
        self._is_over = False
        tried = self._run(TRIAL, Calls("assert f() == 1", ["f"]), seconds=START_S)
        if tried.outcome != "passed":
            raise _refused(tried.why, weak=weak)

    def run(self, code: str, tests: Calls | Programs, *, seconds: float | None = None) -> Verdict:
        """Run one sample.

        Raises:
            SandboxError: The kernel has come to refuse the sandbox.
        """
        return self._run(code, tests, seconds=seconds or self.limits.seconds)

    def end_all(self) -> None:
        """End what runs now, in whatever threads, and all that would come after it: verdicts of no use to anybody."""
        self._is_over = True
        for process in list(self._running):
            process.terminate()

    def _run(self, code: str, tests: Calls | Programs, *, seconds: float) -> Verdict:
        nonce = secrets.token_hex(16)
        cases = tests.cases if isinstance(tests, Programs) else []
        with _folder(is_needed=self.is_weak) as folder:
            job = {"code": code, "seconds": seconds, "num_cases": len(cases), "folder": folder, **self._facts()}
            process = subprocess.Popen(
                [sys.executable, *FLAGS, "-c", START, HOME],
                env=ENVIRONMENT,
                cwd="/",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            began_at = time.monotonic()
            clock = threading.Timer(START_S + seconds * max(1, len(cases)), process.kill)
            clock.start()
            self._running.add(process)
            try:
                if self._is_over:
                    raise ClosedError
                said = self._talk(process, job, tests, nonce)
            except ClosedError:
                is_over = time.monotonic() - began_at > seconds
                said = {"outcome": "timeout" if is_over else "failed", "why": "the sandbox has ended without a verdict"}
            finally:
                self._running.discard(process)
                clock.cancel()
                process.terminate()  # kills what is left; nothing, if it has ended by itself
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    with contextlib.suppress(OSError):
                        pipe.close()  # type: ignore[union-attr]
        return self._verdict(said, nonce)

    def _facts(self) -> dict[str, Any]:
        """Tell what is the same for all samples."""
        limits = self.limits
        return {
            "namespaces": not self.is_weak,
            "home": HOME,
            "paths": _readable_paths(),
            "libraries": _libraries(),
            "user": _spare_user() if self.is_weak else 1,
            "limits": {
                "AS": limits.memory_mib * MIB,
                "FSIZE": limits.file_mib * MIB,
                "NOFILE": 64,
                "NPROC": limits.processes,
            },
        }

    def _talk(
        self, process: "subprocess.Popen[bytes]", job: dict[str, Any], tests: Calls | Programs, nonce: str
    ) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        to, back = process.stdin.fileno(), process.stdout.fileno()
        send(to, job)
        if not self.is_weak:
            answer = receive(back)
            if "refused" in answer:
                return dict(answer)
            try:
                _map_ids(process.pid)
            except OSError as error:
                return {"refused": f"ids in a namespace of users: {error.strerror}"}
            send(to, None)
        with contextlib.suppress(ClosedError):  # it need not hear all to know that the code fails
            if isinstance(tests, Calls):
                send(to, {"source": tests.source, "names": list(tests.names), "before": tests.before, "nonce": nonce})
            else:
                for given, expected in tests.cases:
                    send(to, given)
                    send(to, expected)
                send(to, nonce)
        return dict(receive(back, MIB))

    def _verdict(self, said: dict[str, Any], nonce: str) -> Verdict:
        if "refused" in said:
            raise _refused(said["refused"], weak=self.is_weak)
        if said["outcome"] == "passed" and said["nonce"] != nonce:
            return Verdict("failed", "the tests did not come to their end")
        return Verdict(said["outcome"], said["why"])


def _refused(why: str, *, weak: bool) -> SandboxError:
    return SandboxError(
        f"the kernel must permit the {'weak sandbox' if weak else 'sandbox'} that generated code runs in",
        why,
        "Score the samples on another machine"
        if weak
        else "Score the samples on a machine, or in a container, that permits namespaces of users; or give "
        "--weak-sandbox, without which limits and a filter of system calls are all that keeps the code from your files",
    )


@contextlib.contextmanager
def _folder(*, is_needed: bool) -> Iterator[str | None]:
    """Make a temporary folder that any user may write to, and remove it whatever is in it."""
    if not is_needed:
        yield None
        return
    folder = tempfile.mkdtemp(prefix="mtp-sandbox-")
    try:
        Path(folder).chmod(0o777)
        yield folder
    finally:
        subprocess.run(["chmod", "-R", "u+rwX", folder], stderr=subprocess.DEVNULL)
        shutil.rmtree(folder, ignore_errors=True)


def _map_ids(pid: int) -> None:
    """Say who a process is in its namespace: user 1, who is its own user, but of root's the user nobody."""
    folder, spare = Path(f"/proc/{pid}"), _spare_user()
    if spare is None:
        (folder / "setgroups").write_text("deny")
    for name, own in (("uid_map", os.geteuid()), ("gid_map", os.getegid())):
        (folder / name).write_text(f"1 {own} 1" if spare is None else f"0 {own} 1\n1 {spare} 1")


def _spare_user() -> int | None:
    """Find a user without rights whom root's code can run as; a container need not have one."""
    ranges = [map(int, line.split()) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    is_known = any(first <= NOBODY < first + count for first, _, count in ranges)
    return NOBODY if os.geteuid() == 0 and is_known else None


def _libraries() -> list[str]:
    return list(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))


def _readable_paths() -> list[str]:
    """List what Python and its packages lie in, none within another."""
    paths = sorted({*SYSTEM, sys.base_prefix, sys.base_exec_prefix, *_libraries()})
    return [path for path in paths if not any(path.startswith(f"{other}/") for other in paths)]
