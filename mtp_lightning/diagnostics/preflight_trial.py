"""Checks as lines of a report, and the longest: two real steps, saved, loaded and compared, and a text decoded."""

import json
import os
import platform
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.format.folder import complete_checkpoints
from mtp_lightning.decode import generate
from mtp_lightning.errors import MtpError, file_system_error
from mtp_lightning.launch.local import run_to_end
from mtp_lightning.launch.rank_env import rank_from_env
from mtp_lightning.planner.counts import parameter_counts
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe import Recipe, recipe_to_yaml
from mtp_lightning.training.logging.metrics_files import read_rows

CLOSE = 1e-3
TRIAL_S = 1800
PROMPT_TOKENS = 8
NEW_TOKENS = 12
GIB = 2**30
Check = Callable[[Recipe, torch.device], str]


class Failure(Exception):
    """A check that has found something."""

    def __init__(self, found: str, hint: str) -> None:
        super().__init__(found)
        self.found, self.hint = found, hint


@dataclass(frozen=True)
class Line:
    """The outcome of a check."""

    name: str
    found: str
    hint: str | None = None  # None: all is well

    def __str__(self) -> str:
        mark = "ok  " if self.hint is None else "FAIL"
        return f"{mark} {self.name:<12} {self.found}" + (f". {self.hint}" if self.hint else "")


def run_check(name: str, check: Check, recipe: Recipe, device: torch.device) -> Line:
    """Run a check; a failure of one rank becomes the line of all."""
    try:
        line = Line(name, check(recipe, device))
    except Failure as failure:
        line = Line(name, failure.found, failure.hint)
    except MtpError as error:
        line = Line(name, f"{error.expected}; found {error.found}", error.hint)
    except OSError as error:
        told = file_system_error(error)
        line = Line(name, told.found, told.hint)
    except RuntimeError as error:  # CUDA, NCCL and gloo
        traceback.print_exc()
        line = Line(name, f"{type(error).__name__}: {str(error).splitlines()[0]}", "Look at the traceback of this rank")
    ranks = Ranks()
    lines = ranks.gather((platform.node(), line))
    for rank, (host, other) in enumerate(lines):
        if other.hint is not None:
            line = Line(name, f"rank {rank} on {host}: {other.found}", other.hint)
            break
    if ranks.is_first:
        print(line, flush=True)
    return line


def name_and_free_bytes(device: torch.device) -> tuple[str, int]:
    """Name this rank's device, and say how much of its memory is free."""
    if device.type == "cpu":
        return platform.machine(), os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0]


def train_twice(recipe: Recipe, folder: Path) -> list[int]:
    """Train two steps of one micro-batch each, go back to the first and train the second again, as processes."""
    codes = []
    for name, is_again in (("first", False), ("again", True)):
        rank_info = rank_from_env(os.environ)
        is_first = rank_info is None or rank_info.rank == 0
        if is_first and not is_again:
            _write_trial(recipe, folder)
        if is_again and is_first:
            _go_back(folder)
        arguments = [sys.executable, "-m", "mtp_lightning", "train", str(_wait_for(folder / f"{name}.yaml"))]
        environment = dict(os.environ)
        if rank_info is not None:
            environment |= rank_info.environment | {"MASTER_PORT": str(rank_info.main_port + 1 + is_again)}
        done = run_to_end(arguments, env=environment, timeout=TRIAL_S)
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
        "validate_every_steps": 2,
        "validation_samples": recipe.strategy.num_shares,
        "restart": False,
    }
    batch = {"global_batch_size": recipe.batch.micro_batch_size * recipe.strategy.num_shares}
    trial = recipe.model_copy(
        update={
            "run": recipe.run.model_copy(update=run),
            "checkpoint": recipe.checkpoint.model_copy(update={"every_steps": 1}),
            "logging": recipe.logging.model_copy(update={"every_steps": 1, "loggers": []}),
            "batch": recipe.batch.model_copy(update=batch),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    _write_at_once(folder / "first.yaml", recipe_to_yaml(trial))


def _go_back(folder: Path) -> None:
    """Keep what the second step came to, and take its checkpoint away."""
    checkpoints = folder / "run/checkpoints"
    if (checkpoints / "step-00000002").is_dir():
        outcome = json.dumps(_outcome(folder))
        (folder / "outcome.json").write_text(outcome, encoding="utf-8")
        shutil.rmtree(checkpoints / "step-00000002")
    _write_at_once(folder / "again.yaml", (folder / "first.yaml").read_text(encoding="utf-8"))


def _outcome(folder: Path) -> list[object]:
    """Return loss and digests of weights and moments after the second step."""
    newest = complete_checkpoints(folder / "run/checkpoints")[-1]
    files = newest.manifest.files.items()
    digests = {name: record.sha256 for name, record in files if name.endswith(".safetensors")}
    losses = [row["train/loss_1"] for row in read_rows(folder / "run/metrics.csv") if row["step"] == 2]
    return [newest.step, losses[-1], digests]


def _write_at_once(path: Path, text: str) -> None:
    path.with_suffix(".partial").write_text(text, encoding="utf-8")
    path.with_suffix(".partial").rename(path)


def _wait_for(path: Path) -> Path:
    """Wait for a file that the first rank writes."""
    until = time.monotonic() + 120
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.1)
    return path


def compare_runs(folder: Path, codes: list[list[int]], device: torch.device) -> str:
    """Compare what the second step came to with what it came to again; `codes` are the exit codes of all ranks."""
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


def check_decoding(recipe: Recipe, folder: Path, device: torch.device) -> str:
    """Decode a few tokens on the first rank with drafts and without: they must be the same."""
    if not Ranks().is_first:
        return ""
    needed, (_, free) = 4 * parameter_counts(recipe).total, name_and_free_bytes(device)
    if needed > free:
        return f"not tried: {needed / GIB:.1f} GiB of weights do not fit into the {free / GIB:.1f} GiB of one device"
    _, model = load_model(folder / "run", device=device, verify=False)
    prompt = [token % recipe.model.vocab_size for token in range(1, 1 + PROMPT_TOKENS)]
    drafting, plain = (
        generate(model, [prompt], max_new_tokens=NEW_TOKENS, decoder=decoder) for decoder in ("auto", "greedy")
    )
    same = sum(own == other for own, other in zip(drafting.tokens[0], plain.tokens[0], strict=True))
    what = f"{same} of {NEW_TOKENS} tokens with decoder {drafting.decoder} as without drafts"
    if same < NEW_TOKENS and device.type == "cpu":  # on a GPU rounding decides between tokens of a model so young
        raise Failure(what, "Report this with the recipe: it would train, and decode wrongly")
    return what
