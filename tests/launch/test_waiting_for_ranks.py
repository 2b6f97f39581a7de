"""Ctrl-C and stop signals end a rank that waits for others which never come; real processes and real signals."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from mtp_lightning.launch.signals import INTERRUPTED, REQUEUE
from tests.support import warm
from tests.support.runs import ROOT

WAITING = """
import ctypes, signal, sys
from mtp_lightning.launch.signals import StopRequest, ending_at_signals, stop_on_signals
signal.signal(signal.SIGINT, signal.default_int_handler)
mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
with stop_on_signals(StopRequest()), ending_at_signals("waiting for a lock"):
    print("waits", flush=True)
    lock(mutex), lock(mutex)  # which no signal interrupts
"""
JOINING = """
import signal, sys
from mtp_lightning.launch.signals import StopRequest, stop_on_signals
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.strategies.process_group import process_group
signal.signal(signal.SIGINT, signal.default_int_handler)
recipe = Recipe.model_validate({"strategy": {"kind": "zero2", "ranks_per_node": 2}, "run": {"device": "cpu"}})
with stop_on_signals(StopRequest()), process_group(recipe):
    pass
"""
PASSING = """
import signal, threading
from mtp_lightning.launch.signals import StopRequest, ending_at_signals, stop_on_signals
with stop_on_signals(StopRequest()) as stop:
    stop.defer()
    with ending_at_signals("doing little"):
        signal.raise_signal(signal.SIGWINCH)
    signal.raise_signal(signal.SIGTERM)  # which is only remembered again
    print(stop.exit_code, signal.set_wakeup_fd(-1), threading.active_count())
"""


def start(code, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process, signum):
    process.send_signal(signum)
    try:
        _, said = process.communicate(timeout=10)
    finally:
        process.kill()
    return process.wait(), said


@pytest.mark.parametrize(
    ("signum", "exit_code"),
    [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, REQUEUE), (signal.SIGHUP, REQUEUE)],
)
def test_a_signal_ends_a_wait_outside_of_python(signum, exit_code):
    process = start(WAITING)
    assert process.stdout.readline() == "waits\n"
    time.sleep(0.2)  # until it does
    code, said = ended(process, signum)
    assert code == exit_code
    assert said == f"{signum.name} while waiting for a lock: nothing to save, exit code {exit_code}\n"


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, REQUEUE)])
def test_a_rank_whose_first_never_answers(signum, exit_code):
    with socket.create_server(("127.0.0.1", 0)) as first:
        port = str(first.getsockname()[1])
        place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        process = warm.start(cwd=ROOT, code=JOINING, environment=os.environ | place)
        connection, _ = first.accept()
        with connection:
            code, said = ended(process, signum)
    assert code == exit_code, said
    assert f"{signum.name} while waiting for the other ranks (rank 1 of 2, to meet at 127.0.0.1:{port})" in said


def test_after_the_wait_signals_are_heard_as_before():
    said, _ = start(PASSING).communicate(timeout=10)
    assert said.split() == [str(REQUEUE), "-1", "1"]
