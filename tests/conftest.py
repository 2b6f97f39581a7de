"""What all tests need of their process.

One thread per process: tiny tensors gain nothing from more, and tests share the machine. And SIGHUP as a terminal gives
it, also where the tests were started with nohup: what they start would ignore it as well. Their folders lie in memory
where there is room: a short run waits for the disk some thirty times.
"""

import gc
import os
import signal
import sys
import threading

os.environ["OMP_NUM_THREADS"] = "1"
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGHUP, lambda *_: None)  # a handler, which what is started does not inherit

MEMORY = "/dev/shm"
ROOM_BYTES = 4 * 2**30  # several times what all tests write


def has_room() -> bool:
    """Whether folders of tests may lie in memory: much of it is free, and programs may be run there."""
    try:
        there = os.statvfs(MEMORY)
        with open("/proc/meminfo") as file:  # noqa: PTH123
            free = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in file}
    except OSError:
        return False
    may_run = not there.f_flag & os.ST_NOEXEC and os.access(MEMORY, os.W_OK)
    return may_run and min(there.f_bavail * there.f_frsize, free["MemAvailable"] / 2) >= ROOM_BYTES


if has_room():
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", MEMORY)

gc.disable()  # until the tests begin: what is imported stays, and need not be looked through again and again

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support import warm
from tests.support.fatal import small_file_system

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def warm_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ranks that this process starts be forked from a process that has imported everything."""
    monkeypatch.setattr(sys, "executable", str(warm.server().python))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1500 KiB."""
    with small_file_system(tmp_path / "disk", "1500k") as folder:
        yield folder


LONGEST = ("laws", "training", "cli", "smoke")
"""Folders that workers begin with: at the end each has little left to wait for."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the quick tests of a file on one worker: they share its fixtures, such as trained runs."""
    items.sort(key=lambda item: item.path.relative_to(item.config.rootpath).parts[1] not in LONGEST)
    for item in items:
        if not any(item.iter_markers("xdist_group")) and not any(item.iter_markers("slow")):
            item.add_marker(pytest.mark.xdist_group(group_of(item)))


def group_of(item: pytest.Item) -> str:
    """Name the tests that stay together: those of a file, and those that ask one process with a pretended GPU."""
    path = item.path.relative_to(item.config.rootpath).as_posix()
    return "a pretended GPU" if path.startswith("tests/laws/test_cuda_") else path


def pytest_collection_finish() -> None:
    """Let no collection of garbage look through the modules that all tests import: the trainer asks for one per run."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Begin to collect garbage, also in the process that only hands the tests out; not as often as Python does."""
    gc.set_threshold(10_000, 10, 10)
    gc.enable()
