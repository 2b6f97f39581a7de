"""Runs that hang, for real, and what they leave behind."""

import os
import signal
import time
from pathlib import Path

import pytest

from mtp_lightning.launch.rank_env import free_port
from mtp_lightning.launch.signals import HANG
from mtp_lightning.training.health.stragglers import Pace, slow_ranks
from mtp_lightning.training.health.watchdog import Watchdog
from tests.launch.signalled import after_step, children, start
from tests.support import warm
from tests.support.runs import ROOT
from tests.training.callbacks.tiny_run import TinyModule, fit, tiny_recipe

HANGING = """
import sys, time
from pathlib import Path
from tests.training.callbacks.tiny_run import TinyModule, fit, tiny_recipe

def hang_here(step):
    if step == 5:
        (folder / "hangs").touch()
    for _ in range(round({sleep_s} * 100) if step == 5 else 1):  # time that passes while it is stopped does not count
        time.sleep(0.01)

folder = Path(sys.argv[1])
(folder / "logs/attempt_2").mkdir(parents=True)
recipe = tiny_recipe(hang_after_s={after_s}, hang_factor=3.0)
module = TinyModule(recipe)
module.on_step = hang_here
fit(folder, recipe, module=module)
"""


def start_hanging(folder: Path, **values: float) -> warm.WarmProcess:
    return warm.start(str(folder), cwd=ROOT, code=HANGING.format(**values))


def run_hanging(folder: Path, *, stopped_s: float = 0.0, **values: float) -> tuple[int, str]:
    """Hang in a step, and in it be stopped for a while; return exit code and stderr."""
    process = start_hanging(folder, **values)
    while stopped_s and process.poll() is None and not (folder / "hangs").exists():
        time.sleep(0.01)
    if stopped_s:
        process.send_signal(signal.SIGSTOP)
        time.sleep(stopped_s)
        process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=100)
    return process.wait(), said


def test_a_step_that_hangs_ends_the_process_with_its_stacks(tmp_path: Path) -> None:
    code, said = run_hanging(tmp_path, sleep_s=60, after_s=1.0)
    assert code == HANG, said
    assert "nothing has moved for 1." in said
    assert "in a step after step 4" in said
    stacks = (tmp_path / "logs/attempt_2/hang_rank_0.txt").read_text()
    assert "hang_here" in stacks
    assert stacks.count("most recent call first") >= 2  # all threads


def test_a_step_that_is_slow_is_let_be(tmp_path: Path) -> None:
    code, said = run_hanging(tmp_path, sleep_s=1, after_s=3.0)
    assert code == 0, said
    assert "nothing has moved" not in said
    assert not list(tmp_path.glob("logs/*/hang*"))


@pytest.mark.slow
def test_a_process_that_was_stopped_has_not_hung(tmp_path: Path) -> None:
    code, said = run_hanging(tmp_path, sleep_s=0.5, after_s=2.0, stopped_s=3.0)
    assert code == 0, said
    assert "nothing has moved" not in said


@pytest.mark.slow
def test_a_process_that_hangs_and_was_stopped_is_found_by_the_time_that_it_ran(tmp_path: Path) -> None:
    code, said = run_hanging(tmp_path, sleep_s=60, after_s=1.0, stopped_s=3.0)
    assert code == HANG, said
    assert "nothing has moved for 1." in said


def test_a_multiple_of_the_median_holds_where_it_is_longer(tmp_path: Path) -> None:
    recipe = tiny_recipe(hang_after_s=0.2, hang_factor=20.0)
    module = TinyModule(recipe)
    module.on_step = lambda step: time.sleep(1.0 if step == 5 else 0.1)
    fit(tmp_path, recipe, module=module)  # with 0.2 s it would end here


@pytest.mark.slow
def test_a_run_that_moves_may_take_longer_than_the_limit(tmp_path: Path) -> None:
    recipe = tiny_recipe(steps=30, hang_after_s=1.0, checkpoint_every_steps=100, validate_every_steps=100)
    module = TinyModule(recipe)
    module.on_step = lambda step: time.sleep(0.06)
    fit(tmp_path, recipe, module=module)  # by 1.8 s it would have ended


def test_no_limit_means_no_thread(tmp_path: Path) -> None:
    ended: list[int] = []
    recipe = tiny_recipe(hang_after_s=None)
    module = TinyModule(recipe)
    module.on_step = lambda step: time.sleep(0.1)
    fit(tmp_path, recipe, module=module, extra=[Watchdog(recipe, tmp_path, end=ended.append)])
    assert ended == []


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_rank_that_stands_still_ends_the_run(tmp_path: Path) -> None:
    """One rank is stopped; the other waits for it in vain, and says where."""
    recipe = str(ROOT / "recipes/debug/parallel.yaml")
    two = ("strategy.kind=zero2", "strategy.ranks_per_node=2", "run.steps=5000", "logging.every_steps=1")
    process = start("train", recipe, *two, "run.dir=run", "run.cache=cache", "health.hang_after_s=4", cwd=tmp_path)
    while process.poll() is None and not after_step(8)(tmp_path / "run"):
        time.sleep(0.05)
    os.kill(children(process)[1], signal.SIGSTOP)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == HANG, output
    assert "rank 0 on" in output
    assert "File" in (tmp_path / "run/logs/attempt_1/hang_rank_0.txt").read_text()


def test_slow_ranks_are_those_far_from_the_median() -> None:
    even = [Pace("n1", 0.010, 0.020)] * 3
    assert slow_ranks(even) == {}
    assert slow_ranks([*even, Pace("n2", 0.011, 0.022)]) == {}
    assert slow_ranks([*even, Pace("n2", 0.030, 0.020)]) == {(3, "fetch_s"): pytest.approx(3)}
    assert slow_ranks([Pace("n1", 1e-5, 0.02), Pace("n2", 9e-5, 0.02)]) == {}  # too little to matter
    assert set(slow_ranks([Pace("n1", 0.0, 0.02), Pace("n2", 0.0, 0.05)])) == {(1, "probe_s")}


SLOW_READER = """
import os, time
from mtp_lightning.cli.app import main
from mtp_lightning.data.loading import dataset

read = dataset.SampleDataset.read

def read_slowly(self, samples):
    time.sleep(0.5)
    return read(self, samples)

if os.environ["RANK"] == "1":
    dataset.SampleDataset.read = read_slowly
main()
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_rank_whose_storage_is_slow_is_named(tmp_path: Path) -> None:
    fields = ("strategy.kind=zero2", "strategy.ranks_per_node=2", "run.steps=12", "logging.every_steps=2")
    arguments = ("train", str(ROOT / "recipes/debug/parallel.yaml"), *fields, "run.dir=run", "run.cache=cache")
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        warm.start(
            *arguments,
            cwd=tmp_path,
            code=SLOW_READER,
            environment=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            merged=True,
        )
        for rank in range(2)
    ]
    first, second = (rank.communicate(timeout=150)[0] for rank in ranks)
    assert "slow: rank 1 on " in first, first
    assert "to fetch its rows" in first
    assert "slow: " not in second
