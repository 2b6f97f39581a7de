"""Processes that let a model write documents and are killed, for the tests beside this file."""

from pathlib import Path

import torch

from mtp_lightning.cli.app import app
from mtp_lightning.data.generated import shards as token_shards
from tests.checkpoint.runs import save_run
from tests.support import warm
from tests.support.fatal import die_at_call
from tests.support.runs import ROOT
from tests.support.tiny import tiny_model, tiny_recipe

PROMPTS = ["def main(", "import ", "x = ", "class A", "for i in", "return", "if ", "with open"]
DURABLE = ("fsync", "rename", "unlink", "rmdir", "mkdir")


def save_writer(folder: Path, *, step: int = 1) -> None:
    """Save a tiny model of bytes, random but with a leaning, so that it says little; and prompts for it."""
    recipe = tiny_recipe(model={"vocab_size": 257, "initializer_range": 0.5}, heads={"num_offsets": 2})
    save_run(folder / "run", recipe, step, model=tiny_model(recipe).float())
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))


def arguments(run: Path, out: object, *options: object, prompts: str = "prompts.txt") -> list[str]:
    """Spell the command."""
    given = ["data", "generate", run / "run", "--prompts", run / prompts, "--out", run / str(out)]
    return [str(argument) for argument in (*given, *options)]


def begin_command(command: list[str]) -> warm.WarmProcess:
    """Start `mtp` as a user does."""
    return warm.start(*command, cwd=Path.cwd())


def build_in_a_process(command: list[str], *, fatal_call: int = 0) -> int:
    """Build with many small shards, SIGKILLed at the so-manieth call that touches the disk; return the exit code."""
    code = "import sys; from tests.decode.own_text_builds import build; build(sys.argv[2:], int(sys.argv[1]))"
    done = warm.run(str(fatal_call), *command, cwd=ROOT, code=code)
    return done.returncode


def build(command: list[str], fatal_call: int) -> None:
    """Run the command until that call."""
    torch.set_num_threads(1)
    token_shards.MEMBER_TOKENS, token_shards.SHARD_BYTES = 150, 1500
    die_at_call(fatal_call, DURABLE)
    app(command)
