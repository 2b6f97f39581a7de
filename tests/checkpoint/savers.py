"""Processes that save checkpoints and die, for the tests beside this file."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import torch

from mtp_lightning.checkpoint.commit import remove_leftovers, retain, saving, write_pointer
from mtp_lightning.checkpoint.folder import write_state
from mtp_lightning.checkpoint.layout import newest_complete
from mtp_lightning.checkpoint.manifest import Moment, RunFacts

FACTS = RunFacts(recipe_hash="abc", num_offsets=4, layers={"trunk": 5, "heads": 3})


def forkserver() -> Any:
    """Start processes from one that has torch loaded and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.checkpoint.savers"])
    return context


def state_of_step(step: int, *, width: int = 128) -> dict[str, Any]:
    """Make a state whose every value tells its step."""
    weights = {f"layer{index}": torch.full((width, width), float(step)) for index in range(3)}
    return {
        "global_step": step,
        "state_dict": weights,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.full((width,), float(step))}}}],
        "rng": torch.full((16,), step % 251, dtype=torch.uint8),
    }


def save(folder: Path, step: int, *, keep: int = 2, best: str | None = None) -> None:
    """Save one checkpoint as training does."""
    with saving(folder, Moment(step=step, tokens=step * 64), FACTS) as partial:
        write_state(partial, state_of_step(step))
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
    calls = 0

    def wrap(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fatal_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, wrap(getattr(os, name)))
    save(folder, step)
