"""What file systems refuse: locks, fsync of folders, room, renames. Work goes on, or ends in words."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtp_lightning.data.shards.staging import exclusive_build
from mtp_lightning.errors import CheckpointError, FileSystemError, MtpError, file_system_error, refusal_of
from mtp_lightning.files.atomic_folder import atomic_folder
from mtp_lightning.files.durable import finished_file, replace_durably, write_durably, write_whole
from mtp_lightning.files.lock import _say_once, try_lock, wait_for_lock
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training.fit import train
from tests.support import warm
from tests.support.fatal import small_file_system
from tests.support.runs import ROOT

SMALL = ("run.steps=1", "run.validation_samples=1", "data.seq_len=16", "run.threads=1", "data.corpus=[text]")
RECIPE = str(ROOT / "recipes/debug/parallel.yaml")
MTP = "from mtp_lightning.cli.app import main; main()"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    for number in range(30):
        Path(f"text/{number}.txt").write_text(f"some text of {number} " * 20)
    return tmp_path


@pytest.fixture
def tiny_disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    with small_file_system(tmp_path / "disk", "64k") as place:
        yield place


def refuse(name, reason):
    """A call of the system that refuses."""

    def call(*arguments, **options):
        raise OSError(reason, os.strerror(reason))

    return call


WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF)


@pytest.mark.parametrize("reason", WITHOUT_LOCKS)
def test_where_there_are_no_locks_it_is_said_once_and_nobody_is_kept_out(reason, tmp_path, monkeypatch, capsys):
    _say_once.cache_clear()
    monkeypatch.setattr(fcntl, "flock", refuse("flock", reason))
    with (tmp_path / "a").open("w") as file:
        wait_for_lock(file, on_waiting=lambda holder: pytest.fail(holder))
        assert try_lock(file)
        assert not try_lock(file, without_locks=False)
        with exclusive_build(tmp_path / "out", "0" * 12, print) as path:
            assert path is not None
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "has no locks" in said[0]
    assert os.strerror(reason) in said[0]


def test_another_refusal_of_a_lock_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", refuse("flock", errno.EIO))
    with (tmp_path / "a").open("w") as file, pytest.raises(OSError, match="Input/output"):
        wait_for_lock(file)


def test_a_run_trains_and_goes_on_without_locks(folder):
    unlocked = (
        f"import fcntl, os\ndef flock(*_): raise OSError({errno.ENOLCK}, 'No locks available')\nfcntl.flock = flock\n"
    )
    for steps in (1, 2):
        done = warm.run("train", RECIPE, *SMALL, f"run.steps={steps}", "run.dir=r", cwd=folder, code=unlocked + MTP)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("has no locks (No locks available)") == 1
    assert "after step 1" in done.stdout


@pytest.mark.parametrize("reason", [errno.EINVAL, errno.ENOTSUP])
def test_a_folder_that_cannot_be_forced_to_disk_is_written_all_the_same(reason, tmp_path, monkeypatch):
    fsync = os.fsync
    is_folder = lambda number: os.path.isdir(f"/proc/self/fd/{number}")  # noqa: E731, PTH112
    monkeypatch.setattr(os, "fsync", lambda number: refuse("fsync", reason)() if is_folder(number) else fsync(number))
    with atomic_folder(tmp_path / "out", CheckpointError) as staging:
        write_durably(staging / "a", b"content")
    replace_durably(tmp_path / "out/a", b"other")
    assert (tmp_path / "out/a").read_bytes() == b"other"


@pytest.mark.parametrize("reason", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
def test_a_write_that_is_lost_is_an_error_in_three_parts(reason, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse("fsync", reason))
    with (
        pytest.raises(CheckpointError, match=os.strerror(reason)),
        atomic_folder(tmp_path / "a", CheckpointError) as own,
    ):
        write_durably(own / "a", b"content")
    assert list(tmp_path.iterdir()) == []
    told = file_system_error(OSError(reason, os.strerror(reason), "a/b"))
    assert told.found.startswith(f"a/b: {os.strerror(reason)}")
    assert isinstance(told, FileSystemError)


def test_a_link_to_an_empty_folder_elsewhere_is_followed(tmp_path, tiny_disk):
    (tiny_disk / "there").mkdir()
    (tmp_path / "link").symlink_to(tiny_disk / "there")
    with atomic_folder(tmp_path / "link", CheckpointError) as staging:
        write_durably(staging / "a", b"content")
    assert (tiny_disk / "there/a").read_bytes() == b"content"
    with pytest.raises(CheckpointError, match="name one in it"), atomic_folder(tiny_disk, CheckpointError):
        pass


def test_a_disk_that_is_full_before_the_first_file_is_told(folder, tiny_disk):
    (tiny_disk / "filler").write_bytes(bytes(64 * 1024))
    done = warm.run("train", RECIPE, *SMALL, f"run.dir={tiny_disk}/r", cwd=folder)
    assert (done.returncode, "Traceback" in done.stderr) == (4, False), done.stderr
    assert "No space left on device" in done.stderr
    assert "Make room" in done.stderr
    done = warm.run("data", "build", "--out", f"{tiny_disk}/shards", "text", cwd=folder)
    assert (done.returncode != 0, "Traceback" in done.stderr) == (True, False), done.stderr
    assert [path.name for path in tiny_disk.rglob("*") if path.is_file()] == ["filler"]


@pytest.mark.parametrize(("size", "left"), [("64k", "(0.0 MiB free there)"), ("64k,nr_inodes=3", "(no inode is free")])
def test_what_is_full_is_named_and_an_old_file_stays_whole(size, left, tmp_path):
    with small_file_system(tmp_path / "disk", size) as disk:
        (disk / "old").write_bytes(b"old" * 1000)
        (disk / "other").write_bytes(bytes(60 * 1024))
        for write in (write_whole, replace_durably, write_finished):
            with pytest.raises(OSError, match="No space") as caught:
                write(disk / "old", bytes(8000))
            assert refusal_of(caught.value).startswith(f"{disk}/old")
            assert left in refusal_of(caught.value)
        assert (disk / "old").read_bytes() == b"old" * 1000
        assert sorted(path.name for path in disk.iterdir()) == ["old", "other"]


def write_finished(path, content):
    with finished_file(path) as file:
        file.write(content)


def test_what_a_file_that_somebody_named_is_stays_as_it_was(tmp_path, monkeypatch):
    """A link, its mode, a pipe; and a folder in which nothing can be renamed."""
    (tmp_path / "own").write_bytes(b"old")
    (tmp_path / "own").chmod(0o640)
    (tmp_path / "link").symlink_to("own")
    write_whole(tmp_path / "link", b"new")
    assert ((tmp_path / "link").is_symlink(), (tmp_path / "own").read_bytes()) == (True, b"new")
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o640
    reader, writer = os.pipe()
    write_whole(Path(f"/dev/fd/{writer}"), b"piped")
    assert os.read(reader, 10) == b"piped"
    os.close(reader), os.close(writer)
    monkeypatch.setattr(Path, "replace", refuse("replace", errno.EBUSY))
    write_whole(tmp_path / "own", b"in place")
    assert (tmp_path / "own").read_bytes() == b"in place"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "own"]


@pytest.mark.parametrize("place", ["/proc/mtp", "/sys/mtp", "/dev/null/x", "text/0.txt", "text/0.txt/x", "/dev/full"])
@pytest.mark.parametrize("field", ["run.dir", "run.cache"])
def test_a_place_that_takes_no_folder_is_refused_before_the_first_step(field, place, folder):
    with pytest.raises(MtpError) as caught:
        train(load_recipe(RECIPE, [*SMALL, "run.dir=r", f"{field}={place}"]))
    assert place.removesuffix("/x") in caught.value.found
    assert not Path("r/checkpoints").exists()


def test_a_repository_is_read_without_a_lock_that_a_limit_could_leave(tmp_path):
    """A process that git starts dies of what Python itself ignores: a file beyond `ulimit -f`."""
    git = lambda *words: subprocess.run(["git", "-C", tmp_path, *words], check=True, capture_output=True)  # noqa: E731
    git("init")
    (tmp_path / "file").write_text("text")
    git("add", "file")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "one")
    os.utime(tmp_path / "file", (1, 1))  # git wants to note that it is the same all the same
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
    code = f"{limit}from mtp_lightning.launch.snapshot import revision_of\nprint(len(revision_of({str(tmp_path)!r})))"
    pipe = {"capture_output": True, "text": True, "cwd": ROOT}
    assert subprocess.run([sys.executable, "-c", code], **pipe).stdout == "40\n"
    assert not (tmp_path / ".git/index.lock").exists()
    (tmp_path / "file").write_text("other")
    assert subprocess.run([sys.executable, "-c", code], **pipe).stdout == f"{len('-dirty') + 40}\n"
