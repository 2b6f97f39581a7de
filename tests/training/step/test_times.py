"""Times of a step's parts: they add up, are of each rank, and nobody's wait is another's work."""

import csv

import pytest
import torch

from mtp_lightning.ranks import Ranks
from mtp_lightning.training.step.times import PARTS, StepTimes
from tests.support.ranked import on_ranks
from tests.support.runs import ROOT
from tests.support.slow_rows import SLOW_S


def test_what_lies_between_two_marks_belongs_to_the_later_one(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    times, spent_s = StepTimes(torch.device("cpu")), {"data": 1, "forward": 2, "backward": 4, "reduce": 8, "step": 16}
    for _ in range(3):
        now[0] += 1000  # a validation
        times.begin()
        for part in ("data", "forward", "backward", "forward", "backward", "reduce", "step"):
            now[0] += spent_s[part]
            times.end(part)
    expected = spent_s | {"forward": 4, "backward": 8}
    for factor in (1, 0):
        of_ranks = {f"time/{part}{of}_s": factor * expected[part] for part in PARTS for of in ("", "_min", "_max")}
        assert times.lap(Ranks()) == of_ranks


@pytest.mark.slow
def test_a_slow_rank_shows_in_data_and_the_others_in_what_they_wait_in(tmp_path):
    """ZeRO-2 on two ranks; the profile, of steps before those that are timed, is of both."""
    fields = ("strategy.kind=zero2", "strategy.ranks_per_node=2", "batch.micro_batch_size=2", "run.steps=6")
    more = ("logging.every_steps=3", f"run.dir={tmp_path}/run", f"run.cache={tmp_path}/cache", "--profile", "2-3")
    on_ranks("tests.support.slow_rows", 2, str(ROOT / "recipes/debug/parallel.yaml"), *fields, *more)
    with (tmp_path / "run/metrics.csv").open() as file:
        last = {name: float(cell) for name, cell in list(csv.DictReader(file))[-1].items() if name.startswith("time/")}
    assert last["time/data_min_s"] < SLOW_S / 2 < SLOW_S <= last["time/data_max_s"]
    assert last["time/reduce_min_s"] < SLOW_S / 2 < 0.8 * SLOW_S < last["time/reduce_max_s"]
    for part in PARTS:
        assert 0 < last[f"time/{part}_min_s"] <= last[f"time/{part}_s"] <= last[f"time/{part}_max_s"]
    assert {path.name for path in (tmp_path / "run/profile").iterdir()} == {
        f"rank-{rank}.{kind}" for rank in (0, 1) for kind in ("json.gz", "txt")
    }
