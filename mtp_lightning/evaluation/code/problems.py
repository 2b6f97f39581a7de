"""Problems to write programs for, from the files that they are published as: HumanEval, MBPP, APPS, CodeContests."""

import ast
import builtins
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from mtp_lightning.errors import DataError
from mtp_lightning.evaluation.code.sandbox import Calls, Programs
from mtp_lightning.evaluation.json_lines import Row, json_rows
from mtp_lightning.files.untrusted import described, shown


@final
@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is asked, and how an answer is judged."""

    name: str
    prompt: str  # that a completion follows
    request: str  # the same, as the turn of a user
    stop_strings: tuple[str, ...]  # that end a completion, and are no part of it
    before: str  # that a program begins with when a completion follows
    helpers: str = ""  # that an answer to the request may rely on
    tests: Calls | Programs


@final
@dataclass(frozen=True)
class Task:
    """One kind of file."""

    fields: Mapping[str, type | tuple[type, ...]]  # that a row must have
    name: Callable[[Row], str]
    problems: Callable[[Sequence[Row]], list[Problem]]


HUMANEVAL_STOPS: Final = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
HUMANEVAL_REQUEST: Final = (
    "Please provide a self-contained Python script that solves the following problem in a markdown code block:\n"
    "```python\n{}\n```"
)
MBPP_SHOTS: Final = (2, 3, 4)
MBPP_TEST: Final = range(11, 511)
MBPP_TURN: Final = (
    "You are an expert Python programmer, and here is your task: {} Your code should pass these tests:\n\n{}\n"
)
APPS_FORM: Final = "\nQUESTION:\n{}\n{}\nUse {} format\nANSWER:\n"
APPS_STOPS: Final = ("\nQUESTION:", "\nANSWER:")
FENCED: Final = "{}\n\nAnswer with a Python program in a markdown code block."


def read_problems(task: str, path: Path) -> list[Problem]:
    """Read a file of a task, one JSON object per line; it may be compressed.

    Raises:
        DataError: It cannot be read; says in which line something is wrong.
    """
    kind = TASKS[task]
    rows: dict[str, Row] = {}
    for number, row in json_rows(path):
        wrong = [field for field, types in kind.fields.items() if not isinstance(row.get(field), types)]
        if wrong:
            found = described(row[wrong[0]]) if wrong[0] in row else "none"
            raise _wrong(task, path, f"`{wrong[0]}` in line {number}: {found}", f"a line must have {_named(kind)}")
        name = kind.name(row)
        if name in rows:
            raise _wrong(task, path, f"{shown(name)} again in line {number}", "each problem must be there once")
        rows[name] = row
    try:
        problems = kind.problems(list(rows.values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, SyntaxError) as error:
        raise _wrong(
            task, path, f"{type(error).__name__}: {shown(error)}", "its problems must be as published"
        ) from None
    if not problems:
        raise _wrong(task, path, "none", "there must be a problem to solve")
    return problems


def _named(kind: Task) -> str:
    return ", ".join(f"`{field}`" for field in kind.fields)


def _wrong(task: str, path: Path, found: str, expected: str) -> DataError:
    return DataError(f"in a file of {task} {expected}", f"{found}, {path}", "Download the file again, or name another")


def _humaneval(rows: Sequence[Row]) -> list[Problem]:
    """Read problems as of the Codex paper: the prompt is a function's beginning, the tests a function `check`."""
    return [
        Problem(
            name=row["task_id"],
            prompt=row["prompt"],
            request=HUMANEVAL_REQUEST.format(row["prompt"].strip()),
            stop_strings=HUMANEVAL_STOPS,
            before=row["prompt"],
            helpers=_without(row["entry_point"], row["prompt"]),
            tests=Calls(
                f"{row['test']}\ncheck({row['entry_point']})",
                [row["entry_point"]],
                before=_without(row["entry_point"], row["prompt"]),
            ),
        )
        for row in rows
    ]


def _without(name: str, source: str) -> str:
    """Leave out the function that is asked for: imports and helpers are left.

    >>> _without("f", "import math\\ndef f(x):\\n    '''Say x.'''\\n")
    'import math'
    >>> _without("f", "import math\\ndef f(x):\\n")
    'import math'
    """
    try:
        module = _tree(source)
    except SyntaxError:  # a function without so much as a docstring
        module = _tree(f"{source.rstrip()}\n    pass")
    module.body = [node for node in module.body if getattr(node, "name", None) != name]
    return ast.unparse(module)


def _tree(source: str) -> ast.Module:
    with warnings.catch_warnings(action="ignore"):  # of odd escapes in what is published
        return ast.parse(source)


def _mbpp(rows: Sequence[Row]) -> list[Problem]:
    """Read problems as of Austin et al.: three are shown with their answers, 500 are asked."""
    by_id = {row["task_id"]: row for row in rows}
    if missing := [shot for shot in MBPP_SHOTS if shot not in by_id]:
        raise ValueError(f"no task {missing[0]}, one of the three that prompts show; they are in mbpp.jsonl whole")
    shots = "".join(
        f"{_mbpp_turn(by_id[shot])}[BEGIN]\n{_lines(by_id[shot]['code'])}\n[DONE]\n\n" for shot in MBPP_SHOTS
    )
    return [
        Problem(
            name=str(row["task_id"]),
            prompt=f"{shots}{_mbpp_turn(row)}[BEGIN]\n",
            request=_mbpp_turn(row),
            stop_strings=("[DONE]",),
            before="",
            tests=_asserts(row),
        )
        for row in rows
        if row["task_id"] in MBPP_TEST
    ]


def _mbpp_turn(row: Row) -> str:
    return MBPP_TURN.format(_lines(row["text"]), "\n".join(row["test_list"]))


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n")


def _asserts(row: Row) -> Calls:
    source = _lines("\n".join((row["test_setup_code"], *row["test_list"])))
    defined = {
        node.name for node in _tree(_lines(row["code"])).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    names = [node for node in ast.walk(_tree(source)) if isinstance(node, ast.Name)]
    stored = {name.id for name in names if not isinstance(name.ctx, ast.Load)}
    asked = dict.fromkeys(name.id for name in names if name.id not in stored)
    modules = [name for name in asked if name not in defined and name in sys.stdlib_module_names]
    wanted = [name for name in asked if name in defined or (not hasattr(builtins, name) and name not in modules)]
    return Calls(source, wanted, before="".join(f"import {name}\n" for name in modules))


def _apps(rows: Sequence[Row]) -> list[Problem]:
    """Read problems as of Hendrycks et al.: programs that read and print, or functions with arguments and results."""
    return [_apps_problem(row) for row in rows]


def _apps_problem(row: Row) -> Problem:
    given, starter = row["input_output"], row.get("starter_code") or ""
    text = given if isinstance(given, str) else json.dumps(given)
    cases = json.loads(text, parse_int=str)  # some have more digits than Python reads
    pairs = list(zip(cases["inputs"], cases["outputs"], strict=True))
    function = cases.get("fn_name")
    prompt = APPS_FORM.format(row["question"], starter, "Call-Based" if function else "Standard Input")
    tests = (
        _apps_calls(function, text, has_class="class Solution" in starter)
        if function
        else Programs([(_joined(given), _joined(expected)) for given, expected in pairs])
    )
    if not pairs:
        raise ValueError(f"problem {row['problem_id']} has no tests")
    return Problem(
        name=str(row["problem_id"]),
        prompt=prompt,
        request=FENCED.format(prompt.strip()),
        stop_strings=APPS_STOPS,
        before="",
        tests=tests,
    )


def _joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "\n".join(text)


def _apps_calls(function: str, cases: str, *, has_class: bool) -> Calls:
    """Write tests in which a result may be a tuple for a list, or the first of a list of results."""
    source = (
        f"import json\ncases = json.loads({cases!r})\n"
        "for given, expected in zip(cases['inputs'], cases['outputs']):\n"
        f"    result = {'Solution().' if has_class else ''}{function}(*given)\n"
        "    result = list(result) if isinstance(result, tuple) else result\n"
        "    assert result == expected or (isinstance(expected, list) and expected and result == expected[0])\n"
    )
    return Calls(source, ["Solution" if has_class else function])


def _code_contests(rows: Sequence[Row]) -> list[Problem]:
    """Read problems of CodeContests, all of whose tests must be passed; prompts are AlphaCode's, as comments."""
    problems = []
    for row in rows:
        tests = [row.get(kind) or {} for kind in ("public_tests", "private_tests", "generated_tests")]
        cases = [
            (given, expected)
            for kind in tests
            for given, expected in zip(kind.get("input", []), kind.get("output", []), strict=True)
        ]
        if not cases:
            raise ValueError(f"problem {row['name']} has no tests")
        comment = "".join(f"# {line}".rstrip() + "\n" for line in row["description"].splitlines())
        problems.append(
            Problem(
                name=row["name"],
                prompt=f"# LANGUAGE IS python3\n# CORRECT SOLUTION\n{comment}\n",
                request=FENCED.format(row["description"].strip()),
                stop_strings=("\n# LANGUAGE IS", "\n# CORRECT SOLUTION", "\n# INCORRECT SOLUTION"),
                before="",
                tests=Programs(cases),
            )
        )
    return problems


TASKS: Final[Mapping[str, Task]] = {
    "humaneval": Task(
        {"task_id": str, "prompt": str, "entry_point": str, "test": str}, lambda row: str(row["task_id"]), _humaneval
    ),
    "mbpp": Task(
        {"task_id": int, "text": str, "code": str, "test_list": list, "test_setup_code": str},
        lambda row: str(row["task_id"]),
        _mbpp,
    ),
    "apps": Task(
        {"problem_id": (int, str), "question": str, "input_output": (str, dict)},
        lambda row: str(row["problem_id"]),
        _apps,
    ),
    "codecontests": Task({"name": str, "description": str}, lambda row: str(row["name"]), _code_contests),
}
