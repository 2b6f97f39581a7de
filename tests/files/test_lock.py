"""A lock is held by one process, which is named, and ends with it, however it ends."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtp_lightning.files.lock import ANOTHER, holder_of, is_file_at, locked_files, try_lock, wait_for_lock

HOLD = """
import sys, time
from mtp_lightning.files.lock import wait_for_lock
file = open(sys.argv[1])
wait_for_lock(file, shared=sys.argv[2] == "shared")
print("held", flush=True)
time.sleep(100)
"""


@contextmanager
def held(path: Path, kind: str = "alone") -> Iterator[subprocess.Popen[str]]:
    """Let a process hold a lock."""
    command = [sys.executable, "-c", HOLD, str(path), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_lock_ends_with_the_process_that_holds_it_and_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    with path.open() as file, held(path) as process:
        assert not try_lock(file)
        assert holder_of(file).startswith(f"process {process.pid} (")
        assert str(path) in holder_of(file)
        told: list[str] = []
        thread = threading.Thread(target=wait_for_lock, args=(file,), kwargs={"on_waiting": told.append})
        thread.start()
        while not told:
            time.sleep(0.01)
        process.kill()
        thread.join(timeout=30)
        assert not thread.is_alive()
        assert told == [holder for holder in told if holder.startswith(f"process {process.pid}")]
        assert holder_of(file.fileno()).startswith(f"process {os.getpid()}")
    with path.open() as file:
        assert try_lock(file)


def test_a_lock_that_nobody_of_this_machine_holds_is_of_another_process(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as file:
        assert holder_of(file) == ANOTHER


def test_shared_locks_keep_only_a_lone_holder_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    with path.open() as file, held(path, "shared"):
        told: list[str] = []
        wait_for_lock(file, shared=True, on_waiting=told.append)
        assert not told
        with path.open() as other:
            assert not try_lock(other)


def test_a_file_that_was_renamed_or_removed_is_noticed(tmp_path: Path) -> None:
    with (tmp_path / "a").open("w") as file:
        assert is_file_at(file, tmp_path / "a")
        (tmp_path / "a").rename(tmp_path / "b")
        (tmp_path / "a").touch()
        assert not is_file_at(file, tmp_path / "a")
        assert is_file_at(file.fileno(), tmp_path / "b")
        (tmp_path / "b").unlink()
        assert not is_file_at(file, tmp_path / "b")


def test_the_table_of_locks_is_read_right(tmp_path: Path) -> None:
    before = locked_files()
    with (tmp_path / "lock").open("w") as file:
        wait_for_lock(file)
        new = locked_files().items() - before.items()
        assert os.getpid() in [pid for _, pid in new]
