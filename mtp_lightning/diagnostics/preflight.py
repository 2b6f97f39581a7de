"""Check a recipe on the nodes that it will run on, before an allocation is spent: a line per check."""

import os
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import torch

from mtp_lightning.data.loading.datamodule import MtpDataModule
from mtp_lightning.diagnostics.preflight_trial import (
    Check,
    Failure,
    Line,
    check_decoding,
    compare_runs,
    name_and_free_bytes,
    run_check,
    train_twice,
)
from mtp_lightning.files.atomic_folder import removed_on_error
from mtp_lightning.files.durable import finished_file
from mtp_lightning.launch.run_marker import claim
from mtp_lightning.planner.counts import disk_use, kept_state_bytes
from mtp_lightning.planner.layout import layout_of
from mtp_lightning.planner.memory import memory
from mtp_lightning.planner.shape import shape_of
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe import Recipe
from mtp_lightning.training.strategies.device import prepare_device
from mtp_lightning.training.strategies.process_group import process_group

PACKAGES = ("torch", "lightning", "deepspeed", "numpy", "mtp_lightning")
REDUCED_BYTES = 2**24
WRITTEN_BYTES = 2**24
REPEATS = 3
GIB = 2**30


def preflight(recipe: Recipe) -> int:
    """Run all checks on all ranks, print a line for each on the first; return 0 if all are ok, else 6."""
    lines: list[Line] = []
    with process_group(recipe):
        device = prepare_device(recipe)
        for name, check in CHECKS.items():
            lines.append(run_check(name, check, recipe, device))
        folder = Path(Ranks().broadcast(str(Path(recipe.run.dir).absolute() / f"logs/preflight-{time.time_ns()}")))
    with removed_on_error(folder):
        codes = train_twice(recipe, folder) if all(line.hint is None for line in lines) else None
        _judge(recipe, folder, codes, lines, device)
    return 0 if all(line.hint is None for line in lines) else 6


def _judge(recipe: Recipe, folder: Path, codes: list[int] | None, lines: list[Line], device: torch.device) -> None:
    """Add the lines about two trained steps, where there are any, and remove their folder."""
    with process_group(recipe):
        if codes is not None:
            gathered = Ranks().gather(codes)
            lines.append(run_check("training", lambda *_: compare_runs(folder, gathered, device), recipe, device))
        if codes is not None and lines[-1].hint is None:
            lines.append(run_check("decode", lambda *_: check_decoding(recipe, folder, device), recipe, device))
        Ranks().wait()
        if Ranks().is_first:
            shutil.rmtree(folder, ignore_errors=True)


def _versions(recipe: Recipe, device: torch.device) -> str:
    own = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    first = Ranks().broadcast(own)
    other = [f"{name} {own[name]} instead of {first[name]}" for name in own if own[name] != first[name]]
    if other:
        raise Failure(", ".join(other), "Install the same packages on all nodes")
    return f"{Ranks().size} ranks with python {own['python']}, torch {own['torch']}, deepspeed {own['deepspeed']}"


def _devices(recipe: Recipe, device: torch.device) -> str:
    needed = memory(shape_of(recipe), layout_of(recipe)).total
    name, free = name_and_free_bytes(device)
    names = sorted(set(Ranks().gather(name)))
    if len(names) > 1:
        raise Failure(f"{name}, and among all {', '.join(names)}", "Leave nodes out, or site.constraint=… for one kind")
    if needed > free:
        found = f"{free / GIB:.1f} GiB free, {needed / GIB:.1f} GiB needed by `mtp plan`"
        raise Failure(found, "End what else runs there, or lower batch.micro_batch_size")
    return f"{name}, {free / GIB:.1f} GiB free where {needed / GIB:.2g} GiB are needed"


def _network(recipe: Recipe, device: torch.device) -> str:
    ranks = Ranks(device=device)
    if ranks.size == 1:
        return "one rank"
    times_s, totals = [], []
    for _ in range(REPEATS):
        tensor = torch.full((REDUCED_BYTES // 4,), float(ranks.rank + 1), device=device)
        ranks.wait()
        began_at = time.monotonic()
        totals.append(float(ranks.sum(tensor)[-1]))
        times_s.append(time.monotonic() - began_at)
    if set(totals) != {ranks.size * (ranks.size + 1) / 2}:
        raise Failure(f"sums over all ranks of {totals}", "Check the network's drivers and NCCL on this node")
    bus = 2 * (ranks.size - 1) / ranks.size * REDUCED_BYTES / min(times_s)
    return f"sums over {ranks.size} ranks are right, {bus / 1e9:.2f} GB/s"


def _folder(recipe: Recipe, device: torch.device) -> str:
    """Every rank writes a file and reads every other's."""
    ranks, folder = Ranks(), Path(recipe.run.dir).absolute() / "logs"
    with ranks.raise_on_all_ranks():
        if ranks.is_first:
            claim(folder.parent)
    token = ranks.broadcast(f".preflight-{time.time_ns()}")
    own = folder / f"{token}-{ranks.rank}"
    with ranks.raise_on_all_ranks():
        speed = _written_bytes_per_s(own)
    try:
        missing = [rank for rank in range(ranks.size) if not (folder / f"{token}-{rank}").is_file()]
        slowest = min(ranks.gather(speed))
    finally:
        own.unlink()
    if missing:
        raise Failure(f"{folder} without the files of ranks {missing}", "Give a run.dir that all nodes share")
    return f"{folder.parent} is shared; the slowest rank writes {slowest / 1e6:.0f} MB/s"


def _written_bytes_per_s(path: Path) -> float:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = os.urandom(WRITTEN_BYTES)
    began_at = time.monotonic()
    with finished_file(path) as file:
        file.write(content)
    return WRITTEN_BYTES / (time.monotonic() - began_at)


def _shards(recipe: Recipe, device: torch.device) -> str:
    data = MtpDataModule(recipe)
    with Ranks().raise_on_all_ranks():
        if Ranks().is_first:
            data.prepare_data()
    data.setup("fit")
    return f"{data.describe_training()} to train on, {len(data.validation_samples):,} held out"


def _room(recipe: Recipe, device: torch.device) -> str:
    needed = disk_use(recipe)
    free = shutil.disk_usage(Path(recipe.run.dir).absolute()).free
    checkpoints, needed_gib = f"{needed.num_checkpoints} checkpoints", needed.total / GIB
    if free < needed.total:
        found = f"{free / GIB:.1f} GiB free, {needed_gib:.1f} GiB needed for {checkpoints}"
        raise Failure(found, "Make room, lower checkpoint.keep, or raise checkpoint.keep_every_steps")
    kept = kept_state_bytes(recipe)
    states = f"; states at most {kept / GIB:,.2g} GiB in {recipe.memory.cache_hidden_states}" if kept else ""
    return f"{free / GIB:,.0f} GiB free where {checkpoints} take {needed_gib:,.2g} GiB{states}"


CHECKS: dict[str, Check] = {
    "versions": _versions,
    "devices": _devices,
    "network": _network,
    "run folder": _folder,
    "shards": _shards,
    "room": _room,
}
