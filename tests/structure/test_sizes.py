"""Files and functions stay small enough to be read at once."""

import ast
import re
import statistics
from pathlib import Path

from tests.structure.source import FILES, PACKAGE, ROOT, functions_of

LONGEST_FILE = 400
LONGEST_FUNCTION = 70
MEDIAN_FUNCTION = 10
MOST_POSITIONAL = 5
OF_TORCH = {"train"}  # overrides what takes a boolean there
NAMELESS = re.compile(r"(utils?|common|helpers?|misc)")


def test_files_are_short() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_files_have_names() -> None:
    parts = {name_of(path): path.relative_to(ROOT).with_suffix("").parts for path in FILES}
    assert [name for name, own in parts.items() if any(NAMELESS.fullmatch(part.strip("_")) for part in own)] == []


def test_functions_are_short_and_half_of_them_very_short() -> None:
    lengths = {
        f"{name_of(path)}: {f.name}, line {f.lineno}": num_lines(f) for path in FILES for f in functions_of(path)
    }
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}
    assert statistics.median(lengths.values()) <= MEDIAN_FUNCTION


def test_functions_take_few_positional_arguments_and_no_booleans() -> None:
    found = {
        f"{name_of(path)}: {function.name}, line {function.lineno}": [
            argument
            for argument in (*function.args.posonlyargs, *function.args.args)
            if argument.arg not in ("self", "cls")
        ]
        for path in FILES
        for function in functions_of(path)
        if function.name not in OF_TORCH
    }
    assert [name for name, positional in found.items() if len(positional) > MOST_POSITIONAL] == []
    assert [name for name, positional in found.items() if any(map(is_boolean, positional))] == []


def name_of(path: Path) -> str:
    """Name a file from the package on."""
    return str(path.relative_to(PACKAGE))


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function, its docstring included."""
    return (function.end_lineno or 0) - function.lineno + 1


def is_boolean(argument: ast.arg) -> bool:
    """Say whether an argument is annotated as a boolean."""
    return isinstance(argument.annotation, ast.Name) and argument.annotation.id == "bool"
