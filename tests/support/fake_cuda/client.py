"""Asking a server with a fake GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.runs import ROOT


class FakeCudaError(AssertionError):
    """A job has failed; its text is the traceback."""


class FakeCuda:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def __call__(self, job: str, **arguments: Any) -> Any:
        """Run a job and return its result."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([job, arguments]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise FakeCudaError(f"the server is gone, with code {self._process.wait()}")
        outcome = json.loads(answer)
        if "error" in outcome:
            raise FakeCudaError(outcome["error"])
        return outcome["result"]


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Start a server for the body."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.fake_cuda.server"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield FakeCuda(process)
    finally:
        process.communicate()  # closes its input, at which it ends
