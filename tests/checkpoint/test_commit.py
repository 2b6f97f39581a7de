import os
import signal
from pathlib import Path

import pytest

from mtp_lightning.checkpoint.format.commit import read_pointer, remove_leftovers, retain, save_collectively
from mtp_lightning.checkpoint.format.folder import complete_checkpoints, newest_complete, verify
from mtp_lightning.checkpoint.format.manifest import SavePoint
from mtp_lightning.files.durable import FileRecord
from mtp_lightning.ranks import Ranks
from tests.checkpoint.savers import FACTS, check_step, die_at_call, forkserver, save, shards, write_step


def steps_in(folder: Path) -> list[int]:
    return [checkpoint.step for checkpoint in complete_checkpoints(folder)]


def test_a_committed_state_comes_back(tmp_path: Path) -> None:
    save(tmp_path, 5)
    check_step(tmp_path / "step-00000005", 5)


def test_a_failed_save_leaves_no_trace(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = sorted(tmp_path.iterdir())

    def write(partial: Path) -> dict[str, FileRecord]:
        write_step(partial, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_collectively(Ranks(), tmp_path, SavePoint(step=2, tokens=2), FACTS, write)
    assert sorted(tmp_path.iterdir()) == before


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, keep=99)
    retain(tmp_path, keep=3, best="step-00000002")
    assert steps_in(tmp_path) == [2, 4, 5, 6]
    retain(tmp_path, keep=0, best=None)
    assert steps_in(tmp_path) == [5, 6]


def test_retention_counts_complete_checkpoints_only(tmp_path: Path) -> None:
    for step in range(1, 5):
        save(tmp_path, step, keep=99)
    (tmp_path / "step-00000004" / "state.json").unlink()
    retain(tmp_path, keep=2, best=None)
    assert steps_in(tmp_path) == [2, 3]


def test_leftovers_go_and_everything_else_stays(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000002.partial").mkdir()
    (tmp_path / "step-00000002.partial" / "state.json").write_text("{")
    (tmp_path / "step-00000000.removed").mkdir()
    (tmp_path / "last.tmp").write_text("x")
    kept = [tmp_path / name for name in ("step-00000003.bad", "notes.partial", "mine.tmp")]
    for path in kept:
        path.mkdir()
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "step-00000001", tmp_path / "last"])


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000001" / "old").write_text("from before")
    save(tmp_path, 1)
    verify(tmp_path / "step-00000001")
    assert not (tmp_path / "step-00000001" / "old").exists()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["last", "step-00000001"]


@pytest.mark.timeout(120)
def test_a_kill_at_any_call_of_a_save_keeps_a_good_checkpoint(tmp_path: Path) -> None:
    context = forkserver()
    before_commit, after_commit = 0, 0
    for fatal_call in range(1, 100):
        folder = tmp_path / str(fatal_call)
        for step in (1, 2):
            save(folder, step)
        process = context.Process(target=die_at_call, args=(folder, fatal_call, 3))
        process.start()
        process.join()
        newest = newest_complete(folder)
        assert newest is not None
        check_step(newest.path, newest.step)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        before_commit, after_commit = before_commit + (newest.step == 2), after_commit + (newest.step == 3)
        assert newest.step in (2, 3)
        remove_leftovers(folder)
        assert not [path for path in folder.iterdir() if path.suffix]
        save(folder, 4)
        assert read_pointer(folder, "last") == folder / "step-00000004"
    else:
        pytest.fail("the save never ended")
    assert before_commit >= 8, "six files and the folder are synced, then renamed"
    assert after_commit >= 4, "the parent is synced, the pointer replaced, the oldest checkpoint deleted"


def test_everything_reaches_the_disk_before_the_name_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    def recorded_rename(source: str, target: str) -> None:
        rename(source, target)
        events.append(f"rename to {Path(target).name}")

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)

    def write(partial: Path) -> dict[str, FileRecord]:
        (partial / "notes").write_text("that no record names")
        return write_step(partial, 1)

    save_collectively(Ranks(), tmp_path, SavePoint(step=1, tokens=1), FACTS, write)
    content = ["notes", "recipe.yaml", "other.safetensors", "state.json", *shards(1)]
    assert sorted(events[:-4]) == sorted(content), "each once: a recorded file is not read again"
    assert events[-4:] == ["MANIFEST.json", "step-00000001.partial", "rename to step-00000001", tmp_path.name]
