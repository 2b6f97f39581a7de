"""The library transformers, imported in this one file, and only for models that are built of its classes."""

import importlib
from types import ModuleType

from mtp_lightning.errors import CheckpointError

PARTS = ("cache_utils", "conversion_mapping", "core_model_loading", "initialization")
"""Modules of it that are used; importing the library alone does not load them."""


def library() -> ModuleType:
    """Return transformers, with the parts of it that are used beside its models.

    Raises:
        CheckpointError: It is not installed, or cannot be loaded.
    """
    try:
        import transformers

        for part in PARTS:
            setattr(transformers, part, importlib.import_module(f"transformers.{part}"))
    except ImportError as error:
        raise CheckpointError(
            "the library transformers, 5.23 or newer, must be installed for models of its classes",
            str(error),
            "Install it: pip install 'mtp_lightning[transformers]'",
        ) from error
    return transformers
