"""What can be known before an allocation is spent: each check is a line, ok or with a remedy."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from mtp_lightning.checkpoint.layout import complete_checkpoints
from mtp_lightning.data.datamodule import MtpDataModule
from mtp_lightning.errors import MtpError
from mtp_lightning.launch.seat import find_seat
from mtp_lightning.planner.counts import parameter_counts
from mtp_lightning.planner.layout import layout_of
from mtp_lightning.planner.memory import memory
from mtp_lightning.planner.shape import shape_of
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe import Recipe, recipe_to_yaml
from mtp_lightning.training.callbacks.metrics_table import read_rows
from mtp_lightning.training.device import prepare_device
from mtp_lightning.training.joining import joined_ranks

PACKAGES = ("torch", "lightning", "deepspeed", "numpy", "mtp_lightning")
REDUCED_BYTES = 2**24
WRITTEN_BYTES = 2**24
REPEATS = 3
BYTES_PER_PARAMETER = 14  # of a checkpoint: fp32 weight and two moments, and what goes with them
GIB = 2**30
CLOSE = 1e-3
TRIAL_S = 1800


class Failure(Exception):
    """A check that has found something."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.found, self.remedy = found, remedy


@dataclass(frozen=True)
class Line:
    """The outcome of a check."""

    name: str
    found: str
    remedy: str | None = None  # None: all is well

    def __str__(self) -> str:
        mark = "ok  " if self.remedy is None else "FAIL"
        return f"{mark} {self.name:<12} {self.found}" + (f". {self.remedy}" if self.remedy else "")


def preflight(recipe: Recipe) -> int:
    """Run all checks on all ranks, print a line for each on the first; return 0 if all are ok, else 6."""
    device = prepare_device(recipe)
    lines: list[Line] = []
    with joined_ranks(recipe):
        for name, check in CHECKS.items():
            lines.append(_line(name, check, recipe, device))
        folder = Ranks().broadcast(str(Path(recipe.run.dir).absolute() / f"logs/preflight-{time.time_ns()}"))
    codes = _trial(recipe, Path(folder)) if all(line.remedy is None for line in lines) else None
    with joined_ranks(recipe):
        if codes is not None:
            gathered = Ranks().gather(codes)
            lines.append(_line("training", lambda *_: _compared(Path(folder), gathered, device), recipe, device))
        Ranks().wait()
        if Ranks().is_first:
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if all(line.remedy is None for line in lines) else 6


def _line(name: str, check: "Check", recipe: Recipe, device: torch.device) -> Line:
    """Run a check; what it finds on one rank alone, all ranks learn."""
    try:
        line = Line(name, check(recipe, device))
    except Failure as failure:
        line = Line(name, failure.found, failure.remedy)
    except MtpError as error:
        line = Line(name, f"{error.must_hold}; found {error.found}", error.remedy)
    except OSError as error:
        line = Line(name, f"{error.strerror}: {error.filename}", "Repair access")
    ranks = Ranks()
    lines = ranks.gather((platform.node(), line))
    for rank, (host, other) in enumerate(lines):
        if other.remedy is not None:
            line = Line(name, f"rank {rank} on {host}: {other.found}", other.remedy)
            break
    if ranks.is_first:
        print(line, flush=True)
    return line


def _versions(recipe: Recipe, device: torch.device) -> str:
    own = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    first = Ranks().broadcast(own)
    other = [f"{name} {own[name]} instead of {first[name]}" for name in own if own[name] != first[name]]
    if other:
        raise Failure(", ".join(other), "Install the same packages on all nodes")
    return f"{Ranks().size} ranks with python {own['python']}, torch {own['torch']}, deepspeed {own['deepspeed']}"


def _devices(recipe: Recipe, device: torch.device) -> str:
    needed = memory(shape_of(recipe), layout_of(recipe)).total
    if device.type == "cpu":
        name, free = platform.machine(), os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        seat = find_seat(os.environ)
        index = seat.local_rank if seat else 0
        is_there = index < torch.cuda.device_count()
        name = torch.cuda.get_device_name(index) if is_there else "no GPU"
        free = torch.cuda.mem_get_info(index)[0] if is_there else 0
    names = sorted(set(Ranks().gather(name)))
    if len(names) > 1:
        raise Failure(f"{name}, and among all {', '.join(names)}", "Leave nodes out, or site.constraint=… for one kind")
    if needed > free:
        found = f"{free / GIB:.1f} GiB free, {needed / GIB:.1f} GiB needed by `mtp plan`"
        raise Failure(found, "End what else runs there, or lower batch.micro_rows")
    return f"{name}, {free / GIB:.1f} GiB free where {needed / GIB:.2g} GiB are needed"


def _network(recipe: Recipe, device: torch.device) -> str:
    ranks = Ranks()
    if ranks.size == 1:
        return "one rank"
    place = torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device
    times_s, totals = [], []
    for _ in range(REPEATS):
        tensor = torch.full((REDUCED_BYTES // 4,), float(ranks.rank + 1), device=place)
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
    token = ranks.broadcast(f".preflight-{time.time_ns()}")
    own = folder / f"{token}-{ranks.rank}"
    with ranks.agreeing():
        speed = _written_bytes_per_s(own)
    missing = [rank for rank in range(ranks.size) if not (folder / f"{token}-{rank}").is_file()]
    slowest = min(ranks.gather(speed))
    own.unlink()
    if missing:
        raise Failure(f"{folder} without the files of ranks {missing}", "Give a run.dir that all nodes share")
    return f"{folder.parent} is shared; the slowest rank writes {slowest / 1e6:.0f} MB/s"


def _written_bytes_per_s(path: Path) -> float:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = os.urandom(WRITTEN_BYTES)
    began_at = time.monotonic()
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return WRITTEN_BYTES / (time.monotonic() - began_at)


def _shards(recipe: Recipe, device: torch.device) -> str:
    data = MtpDataModule(recipe)
    with Ranks().agreeing():
        if Ranks().is_first:
            data.prepare_data()
    data.setup("fit")
    return f"{len(data.training_rows):,} rows to train on, {len(data.validation_rows):,} held out"


def _room(recipe: Recipe, device: torch.device) -> str:
    checkpoints = recipe.run.keep_checkpoints + 2  # the best, and the one being written
    needed = checkpoints * BYTES_PER_PARAMETER * parameter_counts(recipe).total
    free = shutil.disk_usage(Path(recipe.run.dir).absolute()).free
    if free < needed:
        found = f"{free / GIB:.1f} GiB free, {needed / GIB:.1f} GiB needed for {checkpoints} checkpoints"
        raise Failure(found, "Make room, or lower run.keep_checkpoints")
    return f"{free / GIB:,.0f} GiB free where {checkpoints} checkpoints take {needed / GIB:,.2g} GiB"


Check = Callable[[Recipe, torch.device], str]
CHECKS: dict[str, Check] = {
    "versions": _versions,
    "devices": _devices,
    "network": _network,
    "run folder": _folder,
    "shards": _shards,
    "room": _room,
}


def _trial(recipe: Recipe, folder: Path) -> list[int]:
    """Train two steps of one micro-batch each, go back to the first and train the second again, as processes."""
    codes = []
    for name, is_again in (("first", False), ("again", True)):
        seat = find_seat(os.environ)
        is_first = seat is None or seat.rank == 0
        if is_first and not is_again:
            _write_trial(recipe, folder)
        if is_again and is_first:
            _go_back(folder)
        arguments = [sys.executable, "-m", "mtp_lightning", "train", str(_appeared(folder / f"{name}.yaml"))]
        environment = dict(os.environ)
        if seat is not None:
            environment |= seat.environment | {"MASTER_PORT": str(seat.main_port + 1 + is_again)}
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=TRIAL_S, check=False)
        codes.append(done.returncode)
        if done.returncode and is_first:
            print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr)
        if done.returncode:
            break
    return codes


def _write_trial(recipe: Recipe, folder: Path) -> None:
    run = {
        "dir": str(folder / "run"),
        "steps": 2,
        "log_every_steps": 1,
        "validate_every_steps": 2,
        "validation_rows": recipe.strategy.num_ranks,
        "checkpoint_every_steps": 1,
        "fresh": False,
    }
    batch = {"rows": recipe.batch.micro_rows * recipe.strategy.num_ranks}
    trial = recipe.model_copy(
        update={"run": recipe.run.model_copy(update=run), "batch": recipe.batch.model_copy(update=batch)}
    )
    folder.mkdir(parents=True, exist_ok=True)
    _place(folder / "first.yaml", recipe_to_yaml(trial))


def _go_back(folder: Path) -> None:
    """Keep what the second step came to, and take its checkpoint away."""
    checkpoints = folder / "run/checkpoints"
    if (checkpoints / "step-00000002").is_dir():
        outcome = json.dumps(_outcome(folder))
        (folder / "outcome.json").write_text(outcome, encoding="utf-8")
        shutil.rmtree(checkpoints / "step-00000002")
    _place(folder / "again.yaml", (folder / "first.yaml").read_text(encoding="utf-8"))


def _outcome(folder: Path) -> list[object]:
    """Return loss and digests of weights and moments after the second step."""
    newest = complete_checkpoints(folder / "run/checkpoints")[-1]
    files = newest.manifest.files.items()
    digests = {name: record.sha256 for name, record in files if name.endswith(".safetensors")}
    losses = [row["train/loss_1"] for row in read_rows(folder / "run/metrics.csv") if row["step"] == 2]
    return [newest.step, losses[-1], digests]


def _place(path: Path, text: str) -> None:
    path.with_suffix(".partial").write_text(text, encoding="utf-8")
    path.with_suffix(".partial").rename(path)


def _appeared(path: Path) -> Path:
    """Wait for a file that the first rank writes."""
    until = time.monotonic() + 120
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.1)
    return path


def _compared(folder: Path, codes: list[list[int]], device: torch.device) -> str:
    bad = [f"rank {rank}: {own[-1]}" for rank, own in enumerate(codes) if any(own)]
    if bad:
        raise Failure(f"exit codes {', '.join(bad)}", "See the message above; `mtp train` says the same")
    if not Ranks().is_first:
        return ""
    once, again = json.loads((folder / "outcome.json").read_text(encoding="utf-8")), _outcome(folder)
    loss, loss_again = float(once[1]), float(str(again[1]))
    if abs(loss - loss_again) > CLOSE * abs(loss):
        raise Failure(f"loss {loss:.6g}, and {loss_again:.6g} after saving and loading", "Report this with the recipe")
    same = "the same weights to the bit" if once == again else "close, though not to the bit"
    if device.type == "cpu" and once != again:
        raise Failure("other weights after saving and loading", "Report this with the recipe")
    return f"two steps, saved, loaded, the second again: loss {loss:.4g}, {same}"
