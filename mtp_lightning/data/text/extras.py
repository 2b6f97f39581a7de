"""Libraries that only some data needs: imported when they are, and named when they are missing."""

import importlib
from typing import Any

from mtp_lightning.errors import DataError


def import_extra(name: str, purpose: str) -> Any:
    """Import a library of the extra `data`.

    Raises:
        DataError: It is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(
            f"the library {name} must be installed to {purpose}",
            str(error),
            "Install it: pip install 'mtp_lightning[data]'",
        ) from error
