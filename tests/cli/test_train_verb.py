"""`mtp train` from its first step to a text of the run's own."""

import re

from tests.support.runs import ROOT, mtp

SAMPLE = "run.sample='def f('"


def test_a_run_ends_with_a_text_and_what_drafting_gained(tmp_path):
    small = ("run.steps=4", "run.validate_every_steps=4", f"run.dir={tmp_path}/run", f"run.cache={tmp_path}/cache")
    recipe = str(ROOT / "recipes/debug/medusa.yaml")
    done = mtp("train", recipe, *small, SAMPLE, "data.seq_len=160", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    gain = r"printing nothing, [\d,]+ and [\d,]+ tokens/s; drafting is \d+\.\d\d times as fast"
    assert re.search(r"a text of the same law; " + gain, done.stderr)
    shown = done.stdout[done.stdout.index("def f(") :]
    drawn = mtp(
        "generate", f"{tmp_path}/run", "--prompt", "def f(", "--temperature", "0.7", "--show-drafts", cwd=tmp_path
    )
    assert shown == drawn.stdout
    quiet = mtp("train", f"{tmp_path}/run", "run.sample=null", cwd=tmp_path)
    assert "def f(" not in quiet.stdout
    assert "is finished" in quiet.stdout
