"""What a server can be asked for."""

import ctypes
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed.runtime.engine  # noqa: F401, before a fork

from mtp_lightning.recipe import Recipe, load_recipe
from tests.support.fake_cuda.fits import run_fit


def fit(guard: ctypes.CDLL, recipe: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """Run a fit of a recipe given by its sections."""
    return _quiet(guard, Recipe.model_validate(recipe), options)


def fit_file(guard: ctypes.CDLL, path: str, overrides: list[str], **options: Any) -> dict[str, Any]:
    """Run a fit of a recipe given by its file."""
    return _quiet(guard, load_recipe(Path(path), overrides).recipe, options)


def _quiet(guard: ctypes.CDLL, recipe: Recipe, options: Mapping[str, Any]) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    return asdict(run_fit(guard, recipe, **options))


JOBS: dict[str, Callable[..., Any]] = {"fit": fit, "fit_file": fit_file}
