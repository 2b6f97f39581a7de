"""A saving process is killed at random moments; what is on disk must always be good."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from mtp_lightning.checkpoint.folder import read_state
from mtp_lightning.checkpoint.layout import newest_complete
from tests.checkpoint.savers import forkserver, save_forever, state_of_step
from tests.checkpoint.test_tree import is_same


def kill_and_check(folder: Path, kills: int) -> None:
    context = forkserver()
    rng = random.Random(7)
    step, partials = 0, 0
    for _ in range(kills):
        process = context.Process(target=save_forever, args=(folder,))
        process.start()
        deadline = time.monotonic() + 30
        while not (folder / f"step-{step + 1:08d}").exists():  # it is under way
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        partials += any(folder.glob("*.partial"))
        newest = newest_complete(folder)
        assert newest is not None
        assert newest.step > step
        assert is_same(read_state(newest.path), state_of_step(newest.step))
        assert not any(folder.glob("*.bad"))
        step = newest.step
    assert partials > kills // 4, "most kills must fall into a save, or nothing was tested"


@pytest.mark.timeout(180)
def test_the_newest_checkpoint_survives_20_kills(tmp_path: Path) -> None:
    kill_and_check(tmp_path, 20)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_newest_checkpoint_survives_100_kills(tmp_path: Path) -> None:
    kill_and_check(tmp_path, 100)
