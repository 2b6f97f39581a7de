"""Files and functions stay small enough to be read at once."""

import ast
import re
import statistics
from pathlib import Path

import pytest

from tests.structure.source import FILES, PACKAGE, ROOT, functions_of

LONGEST_FILE = 400
LONGEST_FUNCTION = 70
MEDIAN_FUNCTION = 10
MOST_POSITIONAL = 5
NAMELESS = re.compile(r"(utils?|common|helpers?|misc)")

by_path = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


@by_path
def test_file_is_short_and_has_a_name(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    assert not [part for part in path.relative_to(ROOT).with_suffix("").parts if NAMELESS.fullmatch(part.strip("_"))]


@by_path
def test_functions_are_short(path: Path) -> None:
    lengths = {function.name: num_lines(function) for function in functions_of(path)}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}


def test_half_of_the_functions_are_very_short() -> None:
    lengths = [num_lines(function) for path in FILES for function in functions_of(path)]
    assert statistics.median(lengths) <= MEDIAN_FUNCTION


@by_path
def test_functions_take_few_positional_arguments_and_no_booleans(path: Path) -> None:
    for function in functions_of(path):
        positional = [
            argument
            for argument in (*function.args.posonlyargs, *function.args.args)
            if argument.arg not in ("self", "cls")
        ]
        booleans = [argument.arg for argument in positional if is_boolean(argument)]
        assert len(positional) <= MOST_POSITIONAL, function.name
        assert not booleans, function.name


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function, its docstring included."""
    return (function.end_lineno or 0) - function.lineno + 1


def is_boolean(argument: ast.arg) -> bool:
    """Say whether an argument is annotated as a boolean."""
    return isinstance(argument.annotation, ast.Name) and argument.annotation.id == "bool"
