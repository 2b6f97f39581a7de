"""Train, distil, extend and decode multi-token prediction language models.

The names of the Python API are imported when they are first used, so that `import mtp_lightning` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtp_lightning.api import GeneratedText, TextModel, generate, load_model, save_model
    from mtp_lightning.data.loading.datamodule import MtpDataModule
    from mtp_lightning.recipe import Recipe, load_recipe
    from mtp_lightning.training.build_callbacks import recipe_callbacks
    from mtp_lightning.training.lightning_module import MtpLightningModule

__version__ = "0.1.0"

__all__ = [
    "GeneratedText",
    "MtpDataModule",
    "MtpLightningModule",
    "Recipe",
    "TextModel",
    "generate",
    "load_model",
    "load_recipe",
    "recipe_callbacks",
    "save_model",
]

_MODULES = {
    "MtpDataModule": "mtp_lightning.data.loading.datamodule",
    "MtpLightningModule": "mtp_lightning.training.lightning_module",
    "Recipe": "mtp_lightning.recipe",
    "load_recipe": "mtp_lightning.recipe",
    "recipe_callbacks": "mtp_lightning.training.build_callbacks",
}


def __getattr__(name: str) -> Any:
    """Import a name of the API from its module."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "mtp_lightning.api")), name)
