"""Exported folders in stock vLLM on the CPU: the text of plain greedy, and as many drafts kept as are predicted.

Not in the normal suite: `pytest -m vllm tests/serve`. The environment is made for the run and thrown away (3.5 GB,
some minutes); MTP_VLLM_PYTHON names the Python of one that is there, as `make_vllm_env.sh FOLDER` makes it.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.serve.cases import CASES, exported_job

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3600)]
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def vllm_python(tmp_path_factory):
    if told := os.environ.get("MTP_VLLM_PYTHON"):
        return told
    folder = tmp_path_factory.mktemp("vllm")
    subprocess.run(["bash", HERE / "make_vllm_env.sh", folder / "env"], check=True)
    return str(folder / "env/bin/python")


@pytest.fixture(scope="module")
def served(vllm_python, tmp_path_factory):
    """Jobs of all cases, and what vLLM made of each: one process after the other."""
    folder = tmp_path_factory.mktemp("served")
    jobs = {name: exported_job(case, folder / name) for name, case in CASES.items()}
    (folder / "jobs.json").write_text(json.dumps([*jobs.values()]))
    command = [vllm_python, HERE / "run_vllm.py", folder / "jobs.json", folder / "results.json"]
    with (folder / "vllm.log").open("wb") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    found = json.loads((folder / "results.json").read_text())
    return {name: (job["expected"], result) for (name, job), result in zip(jobs.items(), found, strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_text_and_counts_are_those_that_are_predicted(served, name):
    """Laws 6 and 7, in an engine of others."""
    expected, found = served[name]
    assert "error" not in found, found
    assert found["texts"] == expected["texts"]
    if CASES[name].num_drafts:
        counts = [kept for row in expected["accepted"] for kept in row]
        assert 0 < sum(counts) < len(counts) * CASES[name].num_drafts
        assert found["num_drafts"] == len(counts)
        assert found["num_draft_tokens"] == len(counts) * CASES[name].num_drafts
        assert found["num_accepted_tokens"] == sum(counts)
        by_place = [sum(kept > place for kept in counts) for place in range(CASES[name].num_drafts)]
        assert found["num_accepted_tokens_per_pos"] == by_place


def test_texts_say_something(served):
    """Without this, texts could agree that repeat one token."""
    for expected, _ in served.values():
        assert min(len({*text}) for text in expected["texts"]) > 3
