"""The examples in docstrings say what the code does."""

import doctest
import importlib
from pathlib import Path

import pytest

from tests.structure.source import FILES, module_of

MODULES = [module_of(path) for path in FILES if "    >>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0
    assert failed == 0


def test_there_are_examples() -> None:
    assert len(MODULES) >= 20
