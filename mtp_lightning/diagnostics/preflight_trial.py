"""Two real steps of a recipe, saved, loaded and compared, and a text decoded with what they have trained."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.format.layout import complete_checkpoints
from mtp_lightning.decode import generate
from mtp_lightning.diagnostics.preflight_lines import Failure, name_and_free_bytes
from mtp_lightning.launch.rank_env import rank_from_env
from mtp_lightning.planner.counts import parameter_counts
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe import Recipe, recipe_to_yaml
from mtp_lightning.training.logging.metrics_table import read_rows

CLOSE = 1e-3
TRIAL_S = 1800
PROMPT_TOKENS = 8
NEW_TOKENS = 12
GIB = 2**30


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
        arguments = [sys.executable, "-m", "mtp_lightning", "train", str(_appeared(folder / f"{name}.yaml"))]
        environment = dict(os.environ)
        if rank_info is not None:
            environment |= rank_info.environment | {"MASTER_PORT": str(rank_info.main_port + 1 + is_again)}
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
        "validate_every_steps": 2,
        "validation_samples": recipe.strategy.num_ranks,
        "restart": False,
    }
    batch = {"global_batch_size": recipe.batch.micro_batch_size * recipe.strategy.num_ranks}
    trial = recipe.model_copy(
        update={
            "run": recipe.run.model_copy(update=run),
            "checkpoint": recipe.checkpoint.model_copy(update={"every_steps": 1}),
            "logging": recipe.logging.model_copy(update={"every_steps": 1}),
            "batch": recipe.batch.model_copy(update=batch),
        }
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


def compared(folder: Path, codes: list[list[int]], device: torch.device) -> str:
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


def decoded(recipe: Recipe, folder: Path, device: torch.device) -> str:
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
