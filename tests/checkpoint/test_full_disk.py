"""A disk that refuses a write while saving: for real, through a small file system and through a size limit."""

import errno
import os
import resource
import shutil
import types
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.checkpoint.format.folder import newest_complete
from mtp_lightning.errors import CheckpointError
from tests.checkpoint.runs import save_run
from tests.checkpoint.savers import check_step, forkserver, save
from tests.support.covering import some_of
from tests.support.tiny import tiny_recipe


def check_failure(folder: Path, error: CheckpointError, reason: int, *, step: int) -> None:
    """The error has its three parts, nothing partial is left, and the earlier checkpoint is good."""
    assert f"checkpoint of step {step}" in error.expected
    assert os.strerror(reason) in error.found
    assert ("MiB free" if reason == errno.ENOSPC else "ulimit -f") in error.found
    assert "step-00000001 is complete" in error.hint
    assert [path.name for path in sorted(folder.iterdir())] == ["last", "step-00000001"]
    newest = newest_complete(folder)
    assert newest is not None
    check_step(newest.path, 1)


def test_a_full_disk_spares_the_previous_checkpoint(small_disk: Path) -> None:
    save(small_disk, 1)
    filler = small_disk / "filler"
    sizes_kib = list(range(0, 1500, 4))
    failures = 0
    for size_kib in sizes_kib[::-5]:  # the disk gets full at another write each time
        try:
            filler.write_bytes(bytes(size_kib * 1024))
        except OSError:
            filler.unlink()
            continue
        try:
            save(small_disk, 2)
        except CheckpointError as error:
            filler.unlink()
            failures += 1
            check_failure(small_disk, error, errno.ENOSPC, step=2)
        else:
            break
    assert failures >= 8
    newest = newest_complete(small_disk)
    assert newest is not None
    assert newest.step == 2, "with room again, saving works again"


def _save_under_limits(pipe: Connection, folder: Path, limits_bytes: list[int]) -> None:
    torch.set_num_threads(1)
    for limit_bytes in limits_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
        try:
            save(folder, 2)
        except CheckpointError as error:
            pipe.send((error.expected, error.found, error.hint))


def test_a_write_that_fails_anywhere_spares_the_previous_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    sizes = {path.stat().st_size for path in (tmp_path / "step-00000001").iterdir()}
    limits_bytes = sorted({0, 1, *(size - 1 for size in sizes), *(size // 2 for size in sizes)})
    context = forkserver()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_save_under_limits, args=(sender, tmp_path, limits_bytes))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    for _ in limits_bytes:
        assert receiver.poll()
        check_failure(tmp_path, CheckpointError(*receiver.recv()), errno.EFBIG, step=2)


def test_a_folder_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    with pytest.raises(CheckpointError, match="there is no earlier checkpoint"):
        save(tmp_path / "checkpoints", 1)


@pytest.mark.parametrize("name", some_of(["consolidated", "trunk", "hf_mtp", "eagle"], one_in=2))
def test_a_disk_that_fills_while_a_model_is_exported(
    name: str, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else takes the room after it was asked for: at every kind of file once."""
    recipe = tiny_recipe(model={"vocab_size": 4000}, heads={"kind": "parallel", "num_offsets": 2})
    save_run(tmp_path / "run", recipe, 1)
    page = os.statvfs(small_disk).f_frsize
    plenty = types.SimpleNamespace(free=2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: plenty)
    failures = []
    for room in range(0, 160, 8):
        filler = small_disk / "filler"
        filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * page - room * page))
        try:
            export_model(tmp_path / "run", small_disk / "out", name)
        except CheckpointError as error:
            failures.append((error.found, sorted(path.name for path in small_disk.iterdir())))
        else:
            break
        finally:
            filler.unlink()
    assert len(failures) > 3
    assert all(os.strerror(errno.ENOSPC) in found and left == ["filler"] for found, left in failures)
    assert (small_disk / "out/config.json").is_file()
