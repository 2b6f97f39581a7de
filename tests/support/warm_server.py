"""A process that has imported what `mtp train` imports, and forks itself for every program that it is asked to run.

Importing torch, Lightning and the trainer takes seconds, which each test that needs a process of its own would pay. A
forked child is a process like any other: it has its own session, folder, environment, standard streams and exit code,
and can be killed. Nothing may be left to a child but what an import leaves: no thread, no device, no random number.

Each request is one packet: a JSON object (code, arguments, cwd, environment, ignored signals) and four file descriptors
(where to tell pid and end, stdin, stdout, stderr). Told are the pid, and when the program has ended its exit code.
The server's own stderr is a file: what the imports print there is printed by every program.
"""

import gc
import json
import os
import signal
import socket
import sys
import types
from pathlib import Path
from typing import Any

import mtp_lightning.cli
import mtp_lightning.training.fit  # noqa: F401

MOST_BYTES = 2**20


def serve(requests: socket.socket) -> None:
    """Fork for every request until the tests have ended, and return in a child once its program has."""
    gc.freeze()  # else the first collection of every child copies all pages
    while True:
        packet, descriptors, _, _ = socket.recv_fds(requests, MOST_BYTES, 4)
        if not packet:
            requests.close()
            return
        check_fork_safety()
        if os.fork() == 0:
            requests.close()
            if supervise(*descriptors):
                run_program(json.loads(packet))
                return
        for descriptor in descriptors:
            os.close(descriptor)
        reap()


def check_fork_safety() -> None:
    """A thread would be missing in children, and hold its locks in them for ever."""
    import torch

    assert len(list(Path("/proc/self/task").iterdir())) == 1, "the imports must start no thread"
    assert not torch.cuda.is_initialized(), "the imports must open no device"


def supervise(answers: int, *streams: int) -> bool:
    """Fork once more; true in the child, in a session of its own; the parent tells pid and exit code, and ends."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        said = os.pread(2, MOST_BYTES, 0)  # by the imports, which this program has made too
        for target, descriptor in enumerate(streams):
            os.dup2(descriptor, target)
        os.write(2, said)
        for descriptor in (answers, *streams):
            os.close(descriptor)
        return True
    for descriptor in streams:
        os.close(descriptor)
    os.setsid()  # whoever interrupts the tests still learns how the program ended
    os.write(answers, f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    os.write(answers, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def reap() -> None:
    """Let go of supervisors that have ended."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return


def run_program(request: dict[str, Any]) -> None:
    """Become `python -c CODE ARGUMENTS...`."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for signum in request["ignored"]:
        signal.signal(signum, signal.SIG_IGN)
    sys.argv[:] = ["-c", *request["arguments"]]
    sys.path[0] = ""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(request["code"], "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
