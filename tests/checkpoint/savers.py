"""Processes that save checkpoints and die, for the tests beside this file."""

import multiprocessing
from pathlib import Path
from typing import Any

import torch

from mtp_lightning.checkpoint.format.commit import remove_leftovers, retain, save_collectively, write_pointer
from mtp_lightning.checkpoint.format.folder import newest_complete
from mtp_lightning.checkpoint.format.manifest import RunMetadata, SavePoint
from mtp_lightning.checkpoint.format.read_shards import ShardReader
from mtp_lightning.checkpoint.format.state_tree import read_state, write_state
from mtp_lightning.checkpoint.format.write_shards import Piece, shard_name, write_pieces
from mtp_lightning.files.durable import FileRecord
from mtp_lightning.ranks import Ranks
from tests.support import fatal

FACTS = RunMetadata(recipe_hash="abc", num_offsets=4, layers={"trunk": 5, "heads": 3}, recipe_text="name: abc\n")


def forkserver() -> Any:
    """Start processes from one that has torch loaded and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.checkpoint.savers"])
    return context


def state_of_step(step: int) -> dict[str, Any]:
    """Make a state whose every value tells its step."""
    return {"global_step": step, "rng": torch.full((16,), step % 251, dtype=torch.uint8)}


def pieces_of_step(step: int, *, width: int = 128) -> list[Piece]:
    """Make whole parameters whose every value tells its step."""
    values = torch.full((width * width,), float(step))
    return [Piece(f"layer{k}", (width, width), 0, values, {"exp_avg": values + k}, float(step)) for k in range(3)]


def write_step(partial: Path, step: int) -> dict[str, FileRecord]:
    """Fill a partial folder as the only rank does."""
    return write_pieces(partial, pieces_of_step(step), 0, 1) | write_state(partial, state_of_step(step))


def shards(num_ranks: int) -> list[str]:
    """Name the shards of a checkpoint of so many ranks."""
    return [shard_name(part, rank, num_ranks) for part in ("model", "optimizer") for rank in range(num_ranks)]


def check_step(checkpoint: Path, step: int) -> None:
    """Check that every value of a checkpoint tells its step."""
    state, reader = read_state(checkpoint), ShardReader(checkpoint)
    assert state["global_step"] == step
    assert torch.equal(state["rng"], state_of_step(step)["rng"])
    assert reader.names == tuple(piece.name for piece in pieces_of_step(step))
    for piece in pieces_of_step(step):
        assert torch.equal(reader.read(piece.name), piece.weight)
        assert torch.equal(reader.read(piece.name, "exp_avg"), piece.moments["exp_avg"])
        assert reader.step(piece.name) == step


def save(folder: Path, step: int, *, keep: int = 2, best: str | None = None) -> None:
    """Save one checkpoint as training does."""
    save_collectively(
        Ranks(), folder, SavePoint(step=step, tokens=step * 64), FACTS, lambda part: write_step(part, step)
    )
    write_pointer(folder, "last", f"step-{step:08d}")
    retain(folder, keep=keep, best=best)


def save_forever(folder: Path) -> None:
    """Save steps from the newest complete one on, until killed."""
    torch.set_num_threads(1)
    remove_leftovers(folder)
    newest = newest_complete(folder)
    step = newest.step if newest else 0
    while True:
        step += 1
        save(folder, step)


def die_at_call(folder: Path, fatal_call: int, step: int) -> None:
    """Save one step, but kill the process at its n-th fsync, rename, replace, unlink or rmdir."""
    torch.set_num_threads(1)
    fatal.die_at_call(fatal_call, ("fsync", "rename", "replace", "unlink", "rmdir"))
    save(folder, step)
