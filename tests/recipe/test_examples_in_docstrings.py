"""The examples in docstrings say what the code does."""

import doctest
import importlib
import pkgutil

import pytest

import mtp_lightning.recipe

MODULES = [module.name for module in pkgutil.walk_packages(mtp_lightning.recipe.__path__, "mtp_lightning.recipe.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_hold(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    assert sum(doctest.testmod(importlib.import_module(name)).attempted for name in MODULES) >= 15
