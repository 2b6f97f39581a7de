"""A folder is there whole or not at all, whenever its process dies; nobody's files are written over."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_lightning.errors import CheckpointError, DataError
from mtp_lightning.files.atomic_folder import (
    atomic_folder,
    check_new_folder,
    check_staging,
    publish,
    remove_folder,
    staging_path,
)
from mtp_lightning.files.durable import write_durably

WRITE = """
import os, signal, sys
from pathlib import Path
from mtp_lightning.errors import DataError
from mtp_lightning.files.atomic_folder import atomic_folder, check_new_folder, check_staging, staging_path
from mtp_lightning.files.durable import write_durably

target, fatal_call, calls = Path(sys.argv[1]), int(sys.argv[2]), 0

def wrap(function):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls == fatal_call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

for name in ("fsync", "rename", "unlink", "rmdir", "mkdir"):
    setattr(os, name, wrap(getattr(os, name)))
check_new_folder(target, DataError)
check_staging(staging_path(target), ("a", "b"), DataError)
with atomic_folder(target, DataError) as staging:
    write_durably(staging / "a", b"1")
    write_durably(staging / "b", b"2")
"""
WHOLE = {"a": b"1", "b": b"2"}


def write(target: Path, fatal_call: int = 0) -> int:
    """Write a folder in a process that is killed at a call which touches the disk; return its exit code."""
    return subprocess.run([sys.executable, "-c", WRITE, target, str(fatal_call)], check=False).returncode


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_at_any_touch_of_the_disk_it_is_whole_or_absent_and_the_same_command_goes_on(tmp_path: Path) -> None:
    for fatal_call in range(1, 50):
        target = tmp_path / str(fatal_call)
        code = write(target, fatal_call)
        if target.exists():
            assert contents(target) == WHOLE
            assert not staging_path(target).exists()
        elif code:
            assert write(target) == 0
            assert contents(target) == WHOLE
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert fatal_call >= 7, "mkdir, two files, the folder, the rename, the parent"
    assert not list(tmp_path.glob("*.partial"))


def test_a_body_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    def write_half() -> None:
        with atomic_folder(tmp_path / "out", DataError) as staging:
            (staging / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_refuses_is_said_in_three_parts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(CheckpointError, match=r"must be written to .*file/out; found .*Not a directory.*Make room"),
        atomic_folder(tmp_path / "file/out", CheckpointError),
    ):
        pass
    with (
        pytest.raises(DataError, match=r"found .* MiB free there of 1,048,576,000,000.0 MiB needed"),
        atomic_folder(tmp_path / "out", DataError, size_bytes=10**6 * 2**40),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_there_is_refused_in_three_parts(tmp_path: Path) -> None:
    for new in (tmp_path / "missing", tmp_path):
        check_new_folder(new, DataError)
    (tmp_path / "one").write_text("mine")
    with pytest.raises(DataError, match=rf"new or empty; found a folder with 1 entry: {tmp_path}\. Name another"):
        check_new_folder(tmp_path, DataError)
    with pytest.raises(CheckpointError, match=rf"new or empty; found a file: {tmp_path}/one\. Name another"):
        check_new_folder(tmp_path / "one", CheckpointError)


def test_a_staging_folder_of_somebody_else_is_kept(tmp_path: Path) -> None:
    staging = staging_path(tmp_path / "out")
    check_staging(staging, ("a",), DataError)
    staging.mkdir()
    (staging / "a").write_text("of a killed process")
    check_staging(staging, ("a",), DataError)
    (staging / "thesis").write_text("mine")
    with pytest.raises(DataError, match=rf"found a folder with 2 entries: {staging}"):
        check_staging(staging, ("a",), DataError)
    assert staging_path(tmp_path / "out", "abc").name == "out.partial-abc"


def test_a_folder_is_replaced_only_when_asked_to(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        write_durably(tmp_path / name / name, b"")
    with pytest.raises(OSError, match="not empty"):
        publish(tmp_path / "new", tmp_path / "old")
    publish(tmp_path / "new", tmp_path / "old", replace=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "new"]
    remove_folder(tmp_path / "old")
    assert not list(tmp_path.iterdir())


HOLD = """
import sys, time
from pathlib import Path
from mtp_lightning.errors import DataError
from mtp_lightning.files.atomic_folder import atomic_folder

with atomic_folder(Path(sys.argv[1]), DataError) as staging:
    (staging / "weights").write_text("first")
    print("begun", flush=True)
    sys.stdin.readline()
    (staging / "config").write_text("first")
"""


@pytest.mark.parametrize("ends", ["well", "killed"])
def test_two_writers_of_a_folder_never_mix_their_files(tmp_path, ends):
    """The second is refused while the first is at it, and comes in where the first was killed."""
    target = tmp_path / "out"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with first:
        assert first.stdout.readline() == "begun\n"
        with (
            pytest.raises(DataError, match="one process at a time may write") as refused,
            atomic_folder(target, DataError),
        ):
            pass
        assert f"process {first.pid} " in refused.value.found
        if ends == "killed":
            first.kill()
        else:
            print(file=first.stdin, flush=True)
    if ends == "killed":
        with atomic_folder(target, DataError) as staging:
            (staging / "config").write_text("second")
        assert contents(target) == {"config": b"second"}
    else:
        assert contents(target) == {"weights": b"first", "config": b"first"}
    assert [*tmp_path.iterdir()] == [target]


def test_what_a_link_of_the_staging_name_leads_to_is_left_alone(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/file").write_text("theirs")
    staging_path(tmp_path / "out").symlink_to(tmp_path / "theirs")
    with pytest.raises(DataError, match="must be written to"), atomic_folder(tmp_path / "out", DataError):
        pass
    assert contents(tmp_path / "theirs") == {"file": b"theirs"}
