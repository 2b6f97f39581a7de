"""`mtp preflight`: every line ok on a machine that is, and what is wrong named before two steps are spent on it."""

import pytest

from tests.support.runs import ROOT, mtp

RECIPE = str(ROOT / "recipes/debug/parallel.yaml")
NAMES = ["versions", "devices", "network", "run", "shards", "room", "training"]


def preflight(cwd, *fields):
    return mtp("preflight", RECIPE, "run.dir=run", "run.cache=cache", *fields, cwd=cwd)


def lines_of(done):
    lines = [line.split() for line in done.stdout.splitlines()]
    return {words[1]: words[0] for words in lines if words and words[0] in ("ok", "FAIL")}


def test_all_is_well_and_nothing_stays_behind(tmp_path):
    done = preflight(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines_of(done) == dict.fromkeys(NAMES, "ok")
    assert "the same weights to the bit" in done.stdout
    assert list((tmp_path / "run/logs").iterdir()) == []


def test_a_model_that_does_not_fit_is_found_before_it_is_built(tmp_path):
    done = preflight(tmp_path, "model.width=65536", "model.num_layers=200")
    assert done.returncode == 6, done.stdout + done.stderr
    found = lines_of(done)
    assert found["devices"] == found["room"] == "FAIL"
    assert "training" not in found
    assert "needed by `mtp plan`" in done.stdout


def test_missing_shards_and_a_folder_that_is_a_file_are_found_together(tmp_path):
    (tmp_path / "run").write_text("")
    done = preflight(tmp_path, "data.shards=nowhere")
    assert done.returncode == 6, done.stdout + done.stderr
    found = lines_of(done)
    assert found["run"] == found["shards"] == "FAIL"
    assert "nowhere" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_ranks_agree(tmp_path):
    done = preflight(tmp_path, "strategy.kind=zero2", "strategy.ranks_per_node=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines_of(done) == dict.fromkeys(NAMES, "ok")
    assert "sums over 2 ranks are right" in done.stdout
