"""Files of problems: read as published, solved by their own solutions, refused with the line that is wrong."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from mtp_lightning.errors import DataError, SandboxError
from mtp_lightning.evaluation.code.answers import code_in, cut, program_of
from mtp_lightning.evaluation.code.problems import read_problems
from mtp_lightning.evaluation.code.sandbox import Sandbox
from tests.evaluation.code import problem_files as files

pytestmark = pytest.mark.xdist_group("sandbox")


@pytest.fixture(scope="module")
def sandbox():
    try:
        return Sandbox()
    except SandboxError as refused:
        pytest.skip(f"this kernel permits no sandbox: {refused.found}")


def test_all_forms_are_read_and_judged(sandbox, tmp_path):
    right = "print(int(input()) + 1)"
    cases = [
        ("humaneval", "he.jsonl.gz", files.HUMANEVAL, [f"    return x + {number}" for number in range(6)]),
        ("mbpp", "mbpp.jsonl", files.MBPP, ["def add(x): return x + 11", "add = lambda x: x + 12"]),
        (
            "apps",
            "apps.jsonl",
            files.APPS,
            [right, "class Solution:\n    def both(self, a, b): return a, b", "same = int"],
        ),
        ("codecontests", "cc.jsonl", files.CODE_CONTESTS, [right]),
    ]
    for task, name, rows, answers in cases:
        problems = read_problems(task, files.write(tmp_path / name, rows))
        assert len(problems) == len(answers)
        for problem, answer in zip(problems, answers, strict=True):
            assert sandbox.run(program_of(problem, answer, is_chat=False), problem.tests).outcome == "passed"
            wrong = answer.replace("+", "-") if "+" in answer else answer[:-3]
            assert sandbox.run(program_of(problem, wrong, is_chat=False), problem.tests).outcome == (
                "passed" if problem.name == "Own/0" else "failed"
            )


def test_prompts_are_those_of_the_papers(tmp_path):
    first, second = read_problems("mbpp", files.write(tmp_path / "m.jsonl", files.MBPP))
    assert [first.name, second.name] == ["11", "12"]
    assert first.prompt.count("[BEGIN]") == 4
    assert first.prompt.count("[DONE]") == 3
    assert "def add(x):\n  return x + 2\n[DONE]\n\nYou are an expert Python programmer, and here" in first.prompt
    assert first.prompt.endswith("assert math.isclose(add(0.5), 11.5)\n[BEGIN]\n")
    (own, *_) = read_problems("humaneval", files.write(tmp_path / "h.jsonl", files.HUMANEVAL))
    assert own.prompt == files.HUMANEVAL[0]["prompt"]
    assert cut("    return 1\n\n\ndef g():\n", own.stop_strings) == "    return 1\n\n"


ANSWERS = {
    "plain": ("def f():\n    pass", "def f():\n    pass"),
    "fenced": ("Sure.\n```python\ndef f(): 1\n```\nDone.", "def f(): 1\n"),
    "not ended": ("```py\ndef f(): 1\n", "def f(): 1\n"),
    "second block": ("```\nprint(1)\n```\nor\n```\ndef f(): 1\n```", "def f(): 1\n"),
    "indented fence": ("1. So:\n   ```python\ndef f(): 1\n   ```", "def f(): 1\n"),
    "after thinking": ("<think>\n```\ndef f(): 0\n```\n</think>\n```\ndef f(): 1\n```", "def f(): 1\n"),
    "no definition": ("```\nf = 1\n```", "f = 1\n"),
    "backticks within": ("```python\ndef f(): return '```'\n```", "def f(): return '```'\n"),
    "windows": ("```python\r\ndef f(): 1\r\n```\r\n", "def f(): 1\r\n"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_code_is_found_in_answers(name):
    answer, code = ANSWERS[name]
    assert code_in(answer, ["f"]) == code


def lines(rows, *, at, line):
    texts = [json.dumps(row) for row in rows]
    texts[at] = line
    return "\n".join(texts)


ROW = files.HUMANEVAL[0]
WRONG = {
    "no JSON": ("humaneval", lines(files.HUMANEVAL, at=2, line="{"), "line 3"),
    "no object": ("humaneval", lines(files.HUMANEVAL, at=1, line="[1]"), "line 2"),
    "too deep": ("humaneval", "[" * 100_000, "line 1"),
    "not UTF-8": ("humaneval", b'{"task_id": "\xff"}', "line 1"),
    "missing field": ("humaneval", lines(files.HUMANEVAL, at=3, line='{"task_id": "x"}'), "`prompt` in line 4: none"),
    "other type": ("humaneval", json.dumps({**ROW, "test": 5}), "`test` in line 1: 5"),
    "twice": ("humaneval", json.dumps(ROW) + "\n\n" + json.dumps(ROW), "Own/0 again in line 3"),
    "no Python": ("humaneval", json.dumps({**ROW, "prompt": "def ("}), "SyntaxError"),
    "empty": ("humaneval", "", "none"),
    "without shots": ("mbpp", json.dumps(files.MBPP[3]), "no task 2"),
    "shots only": ("mbpp", "\n".join(map(json.dumps, files.MBPP[:3])), "none"),
    "another task's": ("mbpp", json.dumps(ROW), "`task_id` in line 1"),
    "no inner JSON": ("apps", json.dumps({**files.APPS[0], "input_output": "{"}), "JSONDecodeError"),
    "no tests": ("apps", json.dumps({**files.APPS[0], "input_output": {"inputs": [], "outputs": []}}), "no tests"),
    "uneven tests": ("apps", json.dumps({**files.APPS[0], "input_output": {"inputs": ["1"], "outputs": []}}), "zip"),
    "no cases": ("codecontests", json.dumps({"name": "a", "description": ""}), "no tests"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused(name, tmp_path):
    task, content, found = WRONG[name]
    path = tmp_path / "file.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as refused:
        read_problems(task, path)
    assert found in refused.value.found
    assert str(path) in refused.value.found


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"x" * 1000)[:20])
    for path in (tmp_path / "none", tmp_path, tmp_path / "cut.gz"):
        with pytest.raises(DataError, match="must be readable"):
            read_problems("humaneval", path)


@files.needs_published
@pytest.mark.parametrize(
    "every", [60, pytest.param(6, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.matrix)]
)
def test_published_solutions_pass(sandbox, every):
    """All 164 and all 500, and none of them when it returns nothing."""
    texts = gzip.decompress((files.PUBLISHED / "HumanEval.jsonl.gz").read_bytes()).decode().splitlines()
    solutions = {row["task_id"]: row["prompt"] + row["canonical_solution"] for row in map(json.loads, texts)}
    texts = (files.PUBLISHED / "mbpp.jsonl").read_text().splitlines()
    solutions |= {str(row["task_id"]): row["code"] for row in map(json.loads, texts)}
    humaneval = read_problems("humaneval", files.PUBLISHED / "HumanEval.jsonl.gz")
    mbpp = read_problems("mbpp", files.PUBLISHED / "mbpp.jsonl")
    assert (len(humaneval), len(mbpp)) == (164, 500)
    problems = [*humaneval, *mbpp][::every]
    jobs = [(solutions[problem.name], problem.tests) for problem in problems]
    jobs += [(code.replace("return", "None;"), tests) for code, tests in jobs[: 100 // every]]
    with ThreadPoolExecutor(2) as threads:
        verdicts = list(threads.map(lambda job: sandbox.run(*job, seconds=60), jobs))
    assert [p.name for p, v in zip(problems, verdicts, strict=False) if v.outcome != "passed"] == []
    assert sum(verdict.outcome == "passed" for verdict in verdicts[len(problems) :]) <= len(problems) / 100
