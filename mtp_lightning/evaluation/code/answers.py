"""From what a model has written to a program."""

import re
from collections.abc import Sequence

from mtp_lightning.evaluation.code.problems import Problem
from mtp_lightning.evaluation.code.sandbox import Calls

BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
THOUGHT = "</think>"


def cut(text: str, stops: Sequence[str]) -> str:
    """End a completion before the first stop string.

    >>> cut("    return 1\\nprint(2)", ["\\nclass", "\\nprint"])
    '    return 1'
    """
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def program_of(problem: Problem, text: str, *, is_chat: bool) -> str:
    """Make the program that is judged: the prompt with its completion, or the code in an answer, with helpers."""
    if not is_chat:
        return problem.before + text
    names = problem.tests.names if isinstance(problem.tests, Calls) else ()
    return f"{problem.helpers}\n{code_in(text, names)}"


def code_in(answer: str, names: Sequence[str]) -> str:
    """Take the first block of code that defines all names, else the first one, else all that is written.

    >>> code_in("So:\\n```python\\ndef f():\\n    pass\\n```\\nThat is f.", ["f"])
    'def f():\\n    pass\\n'
    """
    answer = answer.rpartition(THOUGHT)[2]
    blocks: list[str] = BLOCK.findall(answer) or [answer]
    return next((block for block in blocks if all(_defines(block, name) for name in names)), blocks[0])


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^\s*(?:async def|def|class) {re.escape(name)}\b", code, re.MULTILINE) is not None
