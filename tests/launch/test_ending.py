"""How commands end at signals: what they have begun is put away, nothing is left, and shells are told of the signal."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.run_folders import write_run
from tests.support.runs import ROOT

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
MTP = f"{sys.executable} -m mtp_lightning"
BODY = """
import sys, time
from mtp_lightning.launch.ending import Ending, code_and_words
ending, code = Ending(), 0
ending.begin()
try:
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.5)  # to put things away
        print("put away", flush=True)
except KeyboardInterrupt as interrupt:
    code, words = code_and_words(interrupt)
    print(words, flush=True)
code = ending.finish(code)
time.sleep(float(sys.argv[1]))  # as a thread that is waited for
sys.exit(code)
"""


def start(*arguments: str, cwd: Path | None = None) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        arguments,
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # tests may be in the background
    )


def begun(process: "subprocess.Popen[str]", line: str = "begun\n") -> "subprocess.Popen[str]":
    assert process.stdout is not None
    assert process.stdout.readline() == line
    return process


@pytest.mark.parametrize(
    ("signum", "words"),
    [(signal.SIGINT, "interrupted"), (signal.SIGHUP, "ended by SIGHUP")],
)
def test_what_was_begun_is_put_away_however_hurried_the_user(signum: int, words: str) -> None:
    process = begun(start(sys.executable, "-c", BODY, "0"))
    for _ in range(3):
        process.send_signal(signum)
        time.sleep(0.1)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (-signum, f"put away\n{words}\n")


def test_a_signal_when_all_is_put_away_ends_it_at_once() -> None:
    process = begun(start(sys.executable, "-c", BODY, "60"))
    process.send_signal(signal.SIGTERM)
    begun(process, "put away\n")
    begun(process, "ended by SIGTERM\n")
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(3) == -signal.SIGTERM
    process.communicate()


@pytest.mark.slow
def test_nothing_is_waited_for_without_end() -> None:
    process = begun(start(sys.executable, "-c", BODY, "60"))
    process.send_signal(signal.SIGINT)
    assert process.wait(15) == 128 + signal.SIGINT
    process.communicate()


def test_ctrl_c_ends_the_loop_of_a_shell_too(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    process = start("bash", "-c", f"for i in 1 2; do echo loop $i; {MTP} status {run} --watch; done", cwd=tmp_path)
    begun(process, "loop 1\n")
    eventually(lambda: any(heeds_signals(pid) for pid in children(process)))
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output.splitlines()[-1]) == (-signal.SIGINT, "interrupted")


@pytest.mark.slow
def test_ctrl_c_ends_a_command_with_its_ranks() -> None:
    process = start(sys.executable, "-m", "mtp_lightning", "doctor", "--strategies")
    eventually(lambda: any("--cells" in command(pid) and heeds_signals(pid) for pid in children(process)))
    [rank] = children(process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output.splitlines()[-1]) == (-signal.SIGINT, "interrupted")
    eventually(lambda: not is_alive(rank))


def test_a_process_that_is_run_to_its_end_ends_with_this_one() -> None:
    code = "from mtp_lightning.launch.local import run_to_end; print('begun', flush=True); run_to_end(['sleep', '60'])"
    process = begun(start(sys.executable, "-c", code))
    eventually(lambda: any(Path(f"/proc/{pid}/comm").read_text() == "sleep\n" for pid in children(process)))
    [own] = children(process)
    process.kill()
    process.communicate(timeout=30)
    eventually(lambda: not is_alive(own))


def eventually(holds: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def children(process: "subprocess.Popen[str]") -> list[str]:
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def command(pid: str) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def heeds_signals(pid: str) -> bool:
    [caught] = re.findall(r"SigCgt:\t(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught, 16) >> (signal.SIGHUP - 1) & 1)


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_that_was_forked_has_nothing_to_put_away() -> None:
    body = """
import os, signal, time
from mtp_lightning.launch.ending import Ending
Ending().begin()
read, write = os.pipe()
child = os.fork()
if not child:
    try:
        os.write(write, b"begun")
        time.sleep(60)
    finally:
        print("put away", flush=True)
os.read(read, 5)
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert start(sys.executable, "-c", body).communicate()[0] == f"{-signal.SIGTERM}\n"
