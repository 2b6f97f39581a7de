"""Stands for a Python that runs a module, without its imports: the server of `warm` forks a process that is it.

Arguments: the server's socket, the real Python, and what that would be given. Signals are passed on, this process ends
as the other does, and the other is killed when this one is. Whatever is not `-m MODULE` is left to the real Python.
"""

import json
import os
import signal
import socket
import sys

PASSED_ON = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
RUN_MODULE = "import runpy, sys; sys.argv[0] = {0!r}; runpy.run_module({0!r}, run_name='__main__', alter_sys=True)"


def main(door: str, python: str, *arguments: str) -> None:
    """Have a module run, and end as it does."""
    if arguments[:1] != ("-m",):
        os.execv(python, [python, *arguments])
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    request = {
        "code": RUN_MODULE.format(arguments[1]),
        "arguments": arguments[2:],
        "cwd": os.getcwd(),  # noqa: PTH109
        "environment": dict(os.environ),
        "ignored": [signum for signum in PASSED_ON if signal.getsignal(signum) == signal.SIG_IGN],
        "python": "",
        "trains": not {"RANK", "SLURM_PROCID"}.isdisjoint(os.environ),
        "where": os.getpid(),
    }
    answers, theirs = socket.socketpair()
    with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.connect(door)
        socket.send_fds(channel, [json.dumps(request).encode()], [theirs.fileno(), 0, 1, 2])
    lines = answers.makefile()
    pid = int(lines.readline())
    for signum in PASSED_ON:
        signal.signal(signum, lambda signum, _: os.kill(pid, signum))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    code = int(lines.readline())
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
