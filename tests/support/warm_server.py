"""A process that has imported what `mtp train` imports, and forks itself for every program that it is asked to run.

Importing torch, Lightning and the trainer takes seconds, which each test that needs a process of its own would pay. A
forked child is a process like any other: it has its own session, folder, environment, standard streams and exit code,
and can be killed. Nothing may be left to a child but what an import leaves: no thread, no device, no random number.

Each request is one packet: a JSON object (code, arguments, cwd, environment, ignored signals) and four file descriptors
(where to tell pid and end, stdin, stdout, stderr). Told are the pid, and when the program has ended its exit code; a
program is killed when nobody is there any more to be told. The server's own stderr is a file: what the imports print
there is printed by every program.

Programs that start ranks or other Pythons may ask for them here too: to those that have a `python` in their request it
is `sys.executable`, a script that runs `warm_client`, which sends its request to a second socket.
"""

import atexit
import contextlib
import ctypes
import gc
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import types
import warnings
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg  # noqa: F401
import torch.utils.tensorboard  # noqa: F401

import mtp_lightning.cli
import mtp_lightning.training.fit  # noqa: F401

MOST_BYTES = 2**20


def serve(*channels: socket.socket) -> None:
    """Fork for every request until the tests have ended, and return in a child once its program has."""
    gc.freeze()  # else the first collection of every child copies all pages
    for of_imports in weakref.finalize._registry:  # type: ignore[attr-defined]
        of_imports.atexit = False  # torch would take its operators back one by one
    while True:
        ready, _, _ = select.select(channels, [], [])
        packet, descriptors, _, _ = socket.recv_fds(ready[0], MOST_BYTES, 4)
        if not packet:
            return
        request = json.loads(packet)
        if request["trains"]:
            import_deepspeed()
        check_fork_safety()
        if os.fork() == 0:
            for channel in channels:
                channel.close()
            if where := request.get("where"):
                join_namespaces(where)
            if supervise(*descriptors):
                run_program(request)
                return
        for descriptor in descriptors:
            os.close(descriptor)
        reap()


@cache
def import_deepspeed() -> None:
    """Import what ranks need besides, once there are any, without what it says; and do what every engine does once."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(action="ignore"):
        import deepspeed.ops
        import deepspeed.runtime.zero.muon.muon_optimizer  # much of inductor comes with it

        _ = deepspeed.ops.__compatible_ops__  # asked of the compiler, and remembered
    logging.disable(logging.NOTSET)
    gc.freeze()


def check_fork_safety() -> None:
    """A thread would be missing in children, and hold its locks in them for ever; jemalloc starts its own anew."""
    import torch

    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert len([name for name in threads if name != "jemalloc_bg_thd"]) == 1, (
        f"the imports must start no thread: {threads}"
    )
    assert not torch.cuda.is_initialized(), "the imports must open no device"


def join_namespaces(pid: int) -> None:
    """Be on the pretended node of a process, if it is on one (`cluster/local/slurm.sh`): its host name and files."""
    for name in ("uts", "mnt"):
        theirs = Path(f"/proc/{pid}/ns/{name}")
        if theirs.readlink() != Path(f"/proc/self/ns/{name}").readlink():
            with theirs.open() as file:
                assert ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) == 0, os.strerror(ctypes.get_errno())


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
    select.select([os.pidfd_open(pid), answers], [], [])  # the program has ended, or who asked for it
    if not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
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
    """Become `python -c CODE ARGUMENTS...`; return only by an interrupt, of which Python is to die."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for signum in request["ignored"]:
        signal.signal(signum, signal.SIG_IGN)
    sys.executable = request["python"] or sys.executable
    sys.argv[:] = ["-c", *request["arguments"]]
    sys.path[0] = ""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    code: object = None
    try:
        exec(compile(request["code"], "<string>", "exec"), main.__dict__)
    except SystemExit as end:
        code = end.code
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    leave(code)


def leave(code: object) -> None:
    """End as Python does, without letting go of every module, which would take a third of a second."""
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(code is not None) if not isinstance(code, int) else code)


if __name__ == "__main__":
    serve(*(socket.socket(fileno=int(descriptor)) for descriptor in sys.argv[1:]))
