"""A saving process is killed at random moments; what is on disk must always be good."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mtp_lightning.checkpoint.format.folder import newest_complete
from tests.checkpoint.savers import check_step, forkserver, save_forever

COMPLETE = "step-" + 8 * "[0-9]"


def wait_until(happens: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def kill_and_check(folder: Path, kills: int) -> None:
    context = forkserver()
    rng = random.Random(7)
    step, partials = 0, 0
    for kill in range(kills):
        process = context.Process(target=save_forever, args=(folder,))
        process.start()
        wait_until(lambda due=step + 1: any(int(path.name[5:]) >= due for path in folder.glob(COMPLETE)))
        if kill % 2:  # into a save; else at any moment
            wait_until(lambda: any(folder.glob("*.partial")))
        time.sleep(rng.uniform(0, 0.005 if kill % 2 else 0.06))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        partials += any(folder.glob("*.partial"))
        newest = newest_complete(folder)
        assert newest is not None
        assert newest.step > step
        check_step(newest.path, newest.step)
        assert not any(folder.glob("*.bad"))
        step = newest.step
    assert partials > kills // 5, "many kills must fall into a save, or little was tested"


@pytest.mark.timeout(180)
def test_the_newest_checkpoint_survives_20_kills(tmp_path: Path) -> None:
    kill_and_check(tmp_path, 20)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_newest_checkpoint_survives_100_kills(tmp_path: Path) -> None:
    kill_and_check(tmp_path, 100)
