"""What watchdog, polling for signals and timing of ranks cost, as a ratio within one run."""

import json

import pytest

from mtp_lightning.bench.training.overhead import Times, overhead_of
from tests.support.runs import ROOT, mtp


def test_rounds_are_compared_with_their_neighbours():
    """Steps slow down all the time; watchers add a tenth, which is in their own time too."""
    times = Times(round_steps=2)
    for step in range(20):
        plain = 1.0 + 0.001 * step
        watching = 0.1 if times.is_on(step) else 0.0
        times.step_s.append(plain + watching)
        times.watching_s.append(watching)
    found = overhead_of(times)
    assert [times.is_on(step) for step in range(0, 12, 2)] == [False, True, True, False, False, True]
    assert found.num_pairs == 4
    assert found.paired == pytest.approx(0.1, abs=0.003)
    assert found.inside == pytest.approx(0.1 / 1.11, abs=0.001)
    assert found.step_s == pytest.approx(1.01, abs=0.01)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [(), ("strategy.kind=zero2", "strategy.ranks_per_node=2")], ids=["single", "two"])
def test_the_verb_measures_real_steps(tmp_path, ranks):
    """How much it is, the bench says: a busy machine must not fail a test."""
    fields = ("batch.micro_batch_size=4", "run.cache=cache", "run.threads=1")
    options = ("--pairs", "3", "--round-steps", "5", "--json", "figures.json")
    done = mtp("bench", "overhead", str(ROOT / "recipes/debug/parallel.yaml"), *fields, *ranks, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "with them against steps without" in done.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["num_pairs"] == 3
    assert 0 < figures["inside"] < 1
    assert figures["step_s"] > 0
