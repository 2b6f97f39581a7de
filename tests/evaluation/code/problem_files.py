"""Small files of problems in the published forms, and where the published ones are."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ROOT

PUBLISHED = Path(os.environ.get("MTP_CODE_DATA", ROOT.parent / "shared/data"))
needs_published = pytest.mark.skipif(
    not (PUBLISHED / "mbpp.jsonl").exists(),
    reason="MTP_CODE_DATA must name a folder with HumanEval.jsonl.gz and mbpp.jsonl",
)

PROMPT = """import math


def twice(x):
    return 2 * x


def add_{0}(x):
    '''Add {0}.'''
"""
TEST = """def check(candidate):
    assert candidate(twice(2)) == 4 + {0}
    assert math.isclose(candidate(.5), .5 + {0})
"""
HUMANEVAL = [
    {
        "task_id": f"Own/{number}",
        "prompt": PROMPT.format(number),
        "entry_point": f"add_{number}",
        "canonical_solution": f"    return x + {number}\n",
        "test": TEST.format(number),
    }
    for number in range(6)
]
MBPP = [
    {
        "task_id": number,
        "text": f"Write a function to add {number}.",
        "code": f"def add(x):\r\n  return x + {number}",
        "test_setup_code": "",
        "test_list": [f"assert add(1) == {number + 1}", f"assert math.isclose(add(0.5), {number}.5)"],
    }
    for number in (2, 3, 4, 11, 12, 600)
]
APPS = [
    {
        "problem_id": 7,
        "question": "Print one more.",
        "input_output": json.dumps({"inputs": ["1\n", ["2", ""]], "outputs": ["2\n", ["3"]]}),
    },
    {
        "problem_id": 8,
        "question": "Return both.",
        "starter_code": "class Solution:\n    def both(self, a, b):\n",
        "input_output": {"fn_name": "both", "inputs": [[1, 2], [3, 4]], "outputs": [[1, 2], [[3, 4]]]},
    },
    {
        "problem_id": 9,
        "question": "Return it.",
        "input_output": f'{{"fn_name": "same", "inputs": [[{"7" * 5000}]], "outputs": [{"7" * 5000}]}}',
    },
]
CODE_CONTESTS = [
    {
        "name": "1_A. One more",
        "description": "Print one more.\n\nThan read.",
        "public_tests": {"input": ["1\n"], "output": ["2\n"]},
        "private_tests": {"input": [], "output": []},
        "generated_tests": {"input": ["41"], "output": ["42"]},
    }
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write JSON lines, compressed where the name says so."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path
