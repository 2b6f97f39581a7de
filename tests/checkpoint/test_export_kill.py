"""An export that is killed at any moment leaves no half folder under its name, and the next one goes through."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.checkpoint.format.read_shards import ShardReader
from tests.checkpoint.runs import save_run
from tests.checkpoint.savers import forkserver
from tests.checkpoint.test_kill import wait_until
from tests.support.tiny import HEAD_KINDS, tiny_recipe

RECIPE = tiny_recipe(heads=HEAD_KINDS["sequential"], model={"vocab_size": 40_000})


def export(run: Path, out: Path) -> None:
    """Export in a process of its own."""
    export_model(run, out, "hf_mtp")


def is_complete(folder: Path) -> bool:
    """Tell whether a folder has all that an export writes."""
    ShardReader(folder)
    names = {path.name for path in folder.iterdir()}
    return {"README.md", "config.json", "export.json", "model.safetensors", "modeling_mtp.py"} <= names


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_half_folder_survives_kills(tmp_path: Path) -> None:
    save_run(tmp_path / "run", RECIPE, 1)
    out, rng, context, in_time = tmp_path / "out", random.Random(3), forkserver(), 0
    for _ in range(8):
        process = context.Process(target=export, args=(tmp_path / "run", out))
        process.start()
        wait_until(lambda: (tmp_path / "out.partial").exists() or out.exists())
        time.sleep(rng.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        in_time += not out.exists()
        if out.exists():
            assert is_complete(out)
            out.rename(tmp_path / f"done{_}")
    assert in_time, "no kill fell into an export"
    export(tmp_path / "run", out)
    assert is_complete(out)
    assert not (tmp_path / "out.partial").exists()
