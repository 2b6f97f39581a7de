"""Exported folders in llama.cpp: its converter takes them, and its server drafts with their module.

Not in the normal suite: `pytest -m llama_cpp tests/serve`. Sources and environment are made for the run and thrown
away; MTP_LLAMA_CPP names a folder that is there, as `make_llama_cpp_env.sh FOLDER` makes it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.decode import generate
from tests.checkpoint.runs import save_run
from tests.serve.cases import NUM_TOKENS, PRE_NORM, QWEN3, Case, trained_model
from tests.serve.predicted import counts_in_llama_cpp, left_pending

pytestmark = [pytest.mark.llama_cpp, pytest.mark.timeout(3600)]
HERE = Path(__file__).parent
CASES = {
    "sequential": Case("gguf-ready", {"kind": "sequential", "num_offsets": 3}, QWEN3, 1),
    "folded": Case("gguf-ready", PRE_NORM | {"num_offsets": 2}, QWEN3, 1),
    "recursive": Case("gguf-ready", {"kind": "recursive", "num_offsets": 3}, QWEN3 | {"head_dim": 32}, 2),
    "recursive_of_four": Case("gguf-ready", {"kind": "recursive", "num_offsets": 4}, QWEN3, 3),
}


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory):
    if told := os.environ.get("MTP_LLAMA_CPP"):
        return Path(told)
    folder = tmp_path_factory.mktemp("llama_cpp")
    subprocess.run(["bash", HERE / "make_llama_cpp_env.sh", folder], check=True)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_text_and_counts_are_those_that_are_predicted(name, llama_cpp, tmp_path):
    case = CASES[name]
    model, prompts = trained_model(case.recipe)
    save_run(tmp_path / "run", case.recipe, 1, model=model)
    export_model(tmp_path / "run", tmp_path / "out", case.layout)
    converter = [sys.executable, HERE / "convert_for_llama_cpp.py", llama_cpp / "source"]
    subprocess.run([*converter, tmp_path / "out", tmp_path / "model.gguf"], check=True, capture_output=True)
    job = {"prompts": prompts, "num_tokens": NUM_TOKENS, "num_drafts": case.num_drafts}
    (tmp_path / "job.json").write_text(json.dumps(job))
    asked = [tmp_path / "model.gguf", tmp_path / "job.json", tmp_path / "result.json"]
    subprocess.run([llama_cpp / "env/bin/python", HERE / "run_llama_cpp.py", *asked], check=True, capture_output=True)
    found = json.loads((tmp_path / "result.json").read_text())
    more = NUM_TOKENS + case.recipe.heads.num_offsets
    texts = generate(model, prompts, decoder="greedy", max_new_tokens=more).tokens
    assert found["texts"] == [text[:NUM_TOKENS] for text in texts]
    whole = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    answers = [*zip(prompts, whole, strict=True)]
    left = [None, *(left_pending(model, prompt, text, NUM_TOKENS) for prompt, text in answers)]
    expected = [
        counts_in_llama_cpp(model, *answer, NUM_TOKENS, case.num_drafts, before)
        for answer, before in zip(answers, left, strict=False)
    ]
    assert found["num_draft_tokens"] == [sum(drafted) for drafted, _ in expected]
    assert found["num_accepted_tokens"] == [sum(kept) for _, kept in expected]
    assert 0 < sum(found["num_accepted_tokens"]) < sum(found["num_draft_tokens"])
