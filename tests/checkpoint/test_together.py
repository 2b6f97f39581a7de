"""Several real processes of one process group save one checkpoint together."""

import errno
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mtp_lightning.checkpoint.format.commit import remove_leftovers, save_collectively
from mtp_lightning.checkpoint.format.folder import complete_checkpoints, newest_complete, verify
from mtp_lightning.checkpoint.format.manifest import RunMetadata, SavePoint
from mtp_lightning.checkpoint.format.read_shards import ShardReader
from mtp_lightning.checkpoint.format.state_tree import read_state, write_state
from mtp_lightning.checkpoint.format.write_shards import write_pieces
from mtp_lightning.errors import CheckpointError, MtpError
from mtp_lightning.files.durable import FileRecord
from mtp_lightning.ranks import Ranks
from tests.checkpoint.cutting import MOMENTS, evenly, is_equal, moment_of
from tests.checkpoint.savers import forkserver, shards

Write = Callable[[Path], dict[str, FileRecord]]
Harm = Callable[[Ranks, Write], Write]


def model_of(step: int) -> dict[str, Tensor]:
    return {"a": torch.arange(20.0).reshape(4, 5) + step, "b": torch.arange(7.0) * step}


def facts_of(ranks: Ranks) -> RunMetadata:
    layers = {"trunk": 5, "heads": 3}
    return RunMetadata(
        recipe_hash="abc",
        num_offsets=4,
        layers=layers,
        world_size=ranks.size,
        strategy="zero3",
        recipe_text="name: it\n",
    )


def save_step(ranks: Ranks, folder: Path, step: int, harm: Harm | None = None) -> Path:
    """Save as training does: every rank its pieces, the first rank the rest."""

    def write(partial: Path) -> dict[str, FileRecord]:
        records = write_pieces(partial, evenly(model_of(step), ranks.size)[ranks.rank], ranks.rank, ranks.size)
        return records | (write_state(partial, {"global_step": step}) if ranks.is_first else {})

    moment = SavePoint(step=step, tokens=step * 64)
    return save_collectively(ranks, folder, moment, facts_of(ranks), harm(ranks, write) if harm else write)


def check_saved(checkpoint: Path, step: int) -> None:
    verify(checkpoint)
    reader = ShardReader(checkpoint)
    for name, weight in model_of(step).items():
        assert is_equal(reader.read(name).reshape(weight.shape), weight)
        for kind in MOMENTS:
            assert is_equal(reader.read(name, kind).reshape(weight.shape), moment_of(weight, kind))
    assert read_state(checkpoint) == {"global_step": step}


def _rank(pipe: Connection, folder: Path, rank: int, num_ranks: int, harm: Harm | None) -> None:
    """Save steps 1 and 2, the second with harm done; tell what came of it and what lies there right then."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}.store",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=30),
    )
    ranks = Ranks()
    save_step(ranks, folder, 1)
    try:
        outcome: Any = save_step(ranks, folder, 2, harm)
    except MtpError as error:
        outcome = error
    except Exception as error:
        outcome = repr(error)
    pipe.send((outcome, sorted(path.name for path in folder.iterdir())))


def run_ranks(folder: Path, num_ranks: int, harm: Harm | None = None) -> list[tuple[Any, list[str]] | int]:
    """Run processes to their end; return what each told, or how it died."""
    context = forkserver()
    processes, receivers = [], []
    for rank in range(num_ranks):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(sender, folder, rank, num_ranks, harm))
        process.start()
        sender.close()
        processes.append(process)
        receivers.append(receiver)
    for process in processes:
        process.join(60)
        assert process.exitcode is not None
    return [
        receiver.recv() if process.exitcode == 0 else process.exitcode
        for receiver, process in zip(receivers, processes, strict=True)
    ]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_save_one_checkpoint(tmp_path: Path, num_ranks: int) -> None:
    folder = tmp_path / "checkpoints"
    expected = (folder / "step-00000002", ["step-00000001", "step-00000002"])
    assert run_ranks(folder, num_ranks) == [expected] * num_ranks
    for step in (1, 2):
        check_saved(folder / f"step-{step:08d}", step)
    manifest = complete_checkpoints(folder)[-1].manifest
    assert set(manifest.files) == {*shards(num_ranks), "state.json", "other.safetensors", "recipe.yaml"}
    assert manifest.world_size == num_ranks
    assert manifest.strategy == "zero3"
    assert (folder / "step-00000002" / "recipe.yaml").read_text() == "name: it\n"


def fail_on_last(ranks: Ranks, write: Write) -> Write:
    """Let the last rank find the disk full after it has written."""

    def failing(partial: Path) -> dict[str, FileRecord]:
        records = write(partial)
        if ranks.rank == ranks.size - 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return records

    return failing


def fail_on_first(ranks: Ranks, write: Write) -> Write:
    def failing(partial: Path) -> dict[str, FileRecord]:
        if ranks.is_first:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(partial)

    return failing


def lose_a_file(ranks: Ranks, write: Write) -> Write:
    """Let a rank's file be in another folder than the one that the first rank sees."""

    def losing(partial: Path) -> dict[str, FileRecord]:
        records = write(partial)
        if ranks.rank == 1:
            (partial / shards(ranks.size)[1]).unlink()
        return records

    return losing


def write_the_same(ranks: Ranks, write: Write) -> Write:
    """Let all ranks take themselves for the first."""
    return lambda partial: write_pieces(partial, evenly(model_of(2), 1)[0], 0, 1)


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (fail_on_last, "No space left on device .* MiB free there"),
        (fail_on_first, "No space left on device .* MiB free there"),
        (lose_a_file, "model-00002-of-00003.safetensors written by rank 1 .* seen by rank 0 with None bytes"),
        (write_the_same, "model-00001-of-00001.safetensors written by rank 1 .* written by rank 0 too"),
    ],
)
def test_where_one_rank_fails_all_fail_and_nothing_is_left(tmp_path: Path, harm: Harm, found: str) -> None:
    folder = tmp_path / "checkpoints"
    for outcome in run_ranks(folder, 3, harm):
        assert isinstance(outcome, tuple)
        error, names = outcome
        assert names == ["step-00000001"]
        with pytest.raises(CheckpointError, match=found):
            raise error
    check_saved(folder / "step-00000001", 1)


def give_up_on_one(ranks: Ranks, write: Write) -> Write:
    """Let rank 1 fail with an error of no special kind."""

    def failing(partial: Path) -> dict[str, FileRecord]:
        if ranks.rank == 1:
            raise ZeroDivisionError("by hand")
        return write(partial)

    return failing


def test_any_error_of_one_rank_ends_the_save_on_all(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    told = run_ranks(folder, 2, give_up_on_one)
    other = "RuntimeError('ZeroDivisionError on another rank: by hand')"
    assert told == [(other, ["step-00000001"]), ("ZeroDivisionError('by hand')", ["step-00000001"])]


def die_in_writing(ranks: Ranks, write: Write) -> Write:
    """Kill rank 1 when its files are half there."""

    def dying(partial: Path) -> dict[str, FileRecord]:
        records = write(partial)
        if ranks.rank == 1:
            (partial / shards(ranks.size)[1]).write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return records

    return dying


def test_a_killed_rank_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    first, killed, last = run_ranks(folder, 3, die_in_writing)
    assert killed == -signal.SIGKILL
    for outcome in (first, last):
        assert isinstance(outcome, tuple)
        assert "onnection" in outcome[0], "the others learn that it is gone"
    remove_leftovers(folder)
    newest = newest_complete(folder)
    assert newest is not None
    assert newest.step == 1
    check_saved(newest.path, 1)
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]


def test_a_file_of_another_size_than_recorded_is_refused(tmp_path: Path) -> None:
    def write(partial: Path) -> dict[str, FileRecord]:
        records = write_pieces(partial, evenly(model_of(1), 1)[0], 0, 1)
        (partial / shards(1)[0]).write_bytes(b"cut")
        return records

    with pytest.raises(CheckpointError, match="seen by rank 0 with 3 bytes"):
        save_collectively(Ranks(), tmp_path, SavePoint(step=1, tokens=1), facts_of(Ranks()), write)
    assert list(tmp_path.iterdir()) == []
