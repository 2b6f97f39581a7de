"""The processes inside of the sandbox: a guard with a clock, a referee with the tests, the candidate with the code."""

import builtins
import contextlib
import fcntl
import math
import os
import random
import signal
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mtp_lightning.evaluation.code.inside import walls
from mtp_lightning.evaluation.code.inside.frames import ClosedError, receive, send
from mtp_lightning.evaluation.code.inside.remote import Peer, described

GRACE_S = 2.0  # for the referee to say itself that time is over
LAST_WORDS_S = 0.2  # for processes of the code to end with it
MOST_DESCRIPTORS = 4096

Job = dict[str, Any]
Outcome = tuple[str, str]  # passed, failed or timeout; and why
Decided = tuple[Outcome, str | None]  # with the nonce, if the tests have come to their end


class TimeOverError(BaseException):
    """The time limit has passed."""


def main() -> None:
    """Take a job from stdin, and write its outcome to stdout."""
    job = receive(0)
    walls.die_with_parent(signal.SIGTERM)
    with contextlib.suppress(OSError):  # where memory ends, this goes first
        Path("/proc/self/oom_score_adj").write_text("1000")
    if job["namespaces"]:
        try:
            walls.unshare()
        except walls.RefusedError as refused:
            send(1, {"refused": str(refused)})
            return
        send(1, {"unshared": True})
        receive(0)  # the ids have been mapped from outside
    else:
        walls.adopt_orphans()  # as the first process of a namespace does
    referee = os.fork()
    if referee:
        _guard(referee, job)
        return
    walls.die_with_parent(signal.SIGKILL)
    if not job["namespaces"]:
        walls.adopt_orphans()
    _referee(job)  # and what it forks


def _guard(referee: int, job: Job) -> None:
    """Kill the referee when its time is over, and, with it or after it, all that it has started."""

    def kill(*_: Any) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(referee, signal.SIGKILL)

    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, kill)
    signal.setitimer(signal.ITIMER_REAL, job["seconds"] * max(job["num_cases"], 1) + GRACE_S)
    os.close(0)
    os.waitpid(referee, 0)
    if not job["namespaces"]:  # which end with their first process
        _end_descendants()


def _end_descendants() -> None:
    """Kill all that this process has adopted; those that fork are stopped first, until there are no new ones."""
    stopped: set[int] = set()
    while new := _descendants() - stopped:
        _signal_all(new, signal.SIGSTOP)
        stopped |= new
    _signal_all(stopped, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _signal_all(processes: set[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _descendants() -> set[int]:
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    found: set[int] = set()
    while more := {own for own, parent in parents.items() if parent in {os.getpid(), *found}} - found:
        found |= more
    return found


def _referee(job: Job) -> None:
    try:
        _enclose(job)
    except (walls.RefusedError, OSError) as refused:
        send(1, {"refused": str(refused)})
        os._exit(1)
    signal.signal(signal.SIGALRM, _end_time)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nonce = None
    try:
        signal.setitimer(signal.ITIMER_REAL, job["seconds"])
        decided = _judge_programs(job) if job["num_cases"] else _judge_calls(job)
        if decided is None:  # this is the candidate, and done
            return
        outcome, nonce = decided
    except TimeOverError:
        outcome = ("timeout", f"not done after {job['seconds']:g} s")
    except ClosedError as error:
        outcome = ("failed", f"the code ended before its tests: {error}")
    send(1, {"outcome": outcome[0], "why": outcome[1][:500], "nonce": nonce})
    os._exit(0)


def _end_time(*_: Any) -> NoReturn:
    raise TimeOverError


def _enclose(job: Job) -> None:
    """Put up the walls around this process and its children to come."""
    if job["namespaces"]:
        walls.enter_own_root(job["paths"], job["limits"]["FSIZE"])
    else:
        os.chdir(job["folder"])
    os.umask(0o077)
    walls.give_up_rights(job["user"])
    walls.die_with_parent(signal.SIGKILL)  # which another user's process has forgotten
    own = 0 if job["namespaces"] else _num_tasks()
    walls.limit({**job["limits"], "NPROC": job["limits"]["NPROC"] + own, "CORE": 0})
    sys.path[:] = [path for path in sys.path if path != job["home"]] + job["libraries"]
    os.environ.clear()
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]


def _num_tasks() -> int:
    """Count the threads of this user, all of which a limit is about outside of namespaces."""
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_own = folder.stat().st_uid == os.getuid()
            found += len(list((folder / "task").iterdir())) if is_own else 0
    return found


def _become_candidate(
    job: Job, *, link: Sequence[int] = (), stdin: int | None = None, stdout: int | None = None
) -> None:
    """Keep nothing of the referee's but the link to it, where there is one; it gets the numbers from 3 on."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    nothing = os.open("/dev/null", os.O_RDWR)
    own = [nothing if descriptor is None else descriptor for descriptor in (stdin, stdout, None, *link)]
    out_of_the_way = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10) for descriptor in own]
    for number, descriptor in enumerate(out_of_the_way):
        os.dup2(descriptor, number)
    os.closerange(len(own), MOST_DESCRIPTORS)
    seconds = math.ceil(job["seconds"])
    walls.limit({"CPU": seconds + 1})
    walls.forbid_calls()


def _run(code: str, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    sys.modules[name] = module
    sys.argv = ["solution.py"]
    exec(compile(code, "solution.py", "exec"), module.__dict__)
    return module


def _judge_calls(job: Job) -> Decided | None:
    """Run tests that call the code; None in the candidate."""
    (asked, ask), (told, tell) = os.pipe(), os.pipe()
    candidate = os.fork()
    if not candidate:
        _become_candidate(job, link=(asked, tell))
        peer = Peer(3, 4, is_candidate=True)
        try:
            module = _run(job["code"], "solution")
        except Exception as error:
            peer.tell("raise", *described(error))
            raise
        peer.serve(module)
        return None
    os.close(asked)
    os.close(tell)
    peer, tests = Peer(told, ask, is_candidate=False), receive(0)  # the candidate was forked without them
    try:
        _run_tests(tests, peer)
        peer.tell("end")
    except Exception as error:
        name, text = described(error)
        return ("failed", f"{name}: {text}" if text else name), None
    return _last_words(candidate) or ("passed", ""), tests["nonce"]


def _run_tests(tests: Job, peer: Peer) -> None:
    peer.wait_for("ready")
    random.seed(0)
    sys.set_int_max_str_digits(0)
    names: dict[str, Any] = {"__name__": "tests"}
    exec(compile(tests["before"], "before.py", "exec"), names)
    code = peer.root
    names.update({name: getattr(code, name) for name in tests["names"]})
    exec(compile(tests["source"], "tests.py", "exec"), names)


def _judge_programs(job: Job) -> Decided | None:
    """Run the code as a program, once for each text that it is to read; None in the candidate."""
    for number in range(1, job["num_cases"] + 1):
        signal.setitimer(signal.ITIMER_REAL, job["seconds"])
        stdin, stdout = os.memfd_create("stdin"), os.memfd_create("stdout")
        _fill(stdin, receive(0).encode())
        candidate = os.fork()
        if not candidate:
            _become_candidate(job, stdin=stdin, stdout=stdout)
            _run(job["code"], "__main__")
            return None
        expected = receive(0)  # the candidate was forked without it
        wrong = _last_words(candidate)
        printed = os.pread(stdout, os.fstat(stdout).st_size, 0)
        os.close(stdin)
        os.close(stdout)
        if wrong is None and printed.split() != expected.encode().split():
            wrong = ("failed", "another output")
        if wrong is not None:
            return (wrong[0], f"case {number}: {wrong[1]}"), None
    return ("passed", ""), receive(0)


def _fill(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]
    os.lseek(descriptor, 0, os.SEEK_SET)


def _last_words(candidate: int) -> Outcome | None:
    """Wait for the end of the code; say what was wrong with it."""
    status = os.waitstatus_to_exitcode(os.waitpid(candidate, 0)[1])
    if status != 0:
        return "failed", f"the code ended by signal {-status}" if status < 0 else f"the code ended with status {status}"
    until = time.monotonic() + LAST_WORDS_S
    while time.monotonic() < until:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
        except ChildProcessError:  # there is none
            return None
    return "failed", "the code left processes behind"
