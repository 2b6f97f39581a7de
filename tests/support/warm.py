"""Programs in processes of their own that need not wait for their imports (see `warm_server`)."""

import atexit
import contextlib
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import IO, NoReturn

ROOT = Path(__file__).parents[2]
MTP = "from mtp_lightning.cli.app import main; main()"


class WarmProcess:
    """A program that was forked: what `subprocess.Popen` offers, as far as tests need it. Output goes to files."""

    def __init__(
        self, code: str, arguments: tuple[str, ...], cwd: Path, environment: dict[str, str], options: dict[str, object]
    ) -> None:
        self.args = ["mtp", *arguments]
        self.returncode: int | None = None
        self.outputs = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        ignored = [s for s in (signal.SIGHUP, signal.SIGINT) if signal.getsignal(s) == signal.SIG_IGN]
        request = {
            "code": code,
            "arguments": arguments,
            "cwd": str(cwd),
            "environment": environment,
            "ignored": ignored,
            **options,
        }
        self.answers, theirs = socket.socketpair()
        with theirs, Path(os.devnull).open("rb") as nothing:
            files = [theirs, nothing, *self.outputs]
            socket.send_fds(server().requests, [json.dumps(request).encode()], [file.fileno() for file in files])
        self.lines = self.answers.makefile()
        self.pid = int(self.lines.readline() or fail())

    def poll(self) -> int | None:
        """Exit code, negative after a signal; None while the program runs."""
        if self.returncode is None and select.select([self.answers], [], [], 0)[0]:
            self.returncode = int(self.lines.readline())
            self.lines.close()
            self.answers.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; raises `TimeoutExpired`."""
        if self.poll() is None and not select.select([self.answers], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        code = self.poll()
        assert code is not None
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end, and return all that was printed on stdout and stderr."""
        self.wait(timeout)
        return self.output(0), self.output(1)

    def output(self, number: int = 0) -> str:
        """What was printed so far."""
        return os.pread(self.outputs[number].fileno(), 2**26, 0).decode(errors="replace")

    def send_signal(self, signum: int) -> None:
        """Send a signal, if the program still runs."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def __del__(self) -> None:
        for file in (*self.outputs, self.answers):
            file.close()

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def start(
    *arguments: str,
    cwd: Path,
    code: str = MTP,
    environment: dict[str, str] | None = None,
    merged: bool = False,
    warm_ranks: bool = False,
    trains: bool | None = None,
) -> WarmProcess:
    """Start a program, `mtp` unless told another; with `warm_ranks` the ranks that it starts are forked too.

    What `trains` may need DeepSpeed, which takes seconds to import: a rank, unless told otherwise.
    """
    if merged:
        code = f"import os; os.dup2(1, 2)\n{code}"
    environment = dict(os.environ) if environment is None else environment
    options = {
        "python": str(server().python) if warm_ranks else "",
        "trains": "RANK" in environment if trains is None else trains,
    }
    return WarmProcess(code, arguments, cwd, environment, options)


def run(
    *arguments: str, cwd: Path, timeout: float | None = None, **options: object
) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end, as `subprocess.run` does."""
    process = start(*arguments, cwd=cwd, **options)
    try:
        stdout, stderr = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.wait(), stdout, stderr)


@cache
def log() -> IO[bytes]:
    """The file that the server prints to."""
    return tempfile.TemporaryFile()


def fail() -> NoReturn:
    """Tell why there is no server."""
    raise RuntimeError("the server must run; it ended with: " + os.pread(log().fileno(), 2**20, 0).decode())


class Server:
    """The server of this process, and a `python` that has it run modules."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mtp-warm-")
        door, self.python = Path(self._folder.name, "door"), Path(self._folder.name, "python")
        client = [sys.executable, "-IS", str(ROOT / "tests/support/warm_client.py"), str(door), sys.executable]
        self.python.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n')
        self.python.chmod(0o755)
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as clients:
            clients.bind(str(door))
            descriptors = [theirs.fileno(), clients.fileno()]
            self._process = subprocess.Popen(
                [sys.executable, "-W", "default", "-m", "tests.support.warm_server", *map(str, descriptors)],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                stdout=log(),
                stderr=log(),
                start_new_session=True,
            )

    def end(self) -> None:
        """Let the server end."""
        self.requests.close()
        self._process.wait()
        log().close()
        self._folder.cleanup()


@cache
def server() -> Server:
    """Start the server of this process."""
    started = Server()
    atexit.register(started.end)
    return started
