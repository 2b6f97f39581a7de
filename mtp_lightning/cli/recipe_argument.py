"""The RECIPE argument of every verb: a recipe file, or the folder of an earlier run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mtp_lightning.errors import RunFolderError

if TYPE_CHECKING:
    from mtp_lightning.recipe.loading.load import LoadedRecipe

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the folder of an earlier run.", show_default=False)
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Fields to change, e.g. run.steps=200 model.hidden_size=256; a recipe file among them is laid over RECIPE.",
        show_default=False,
    ),
]


def open_recipe(recipe: str, overrides: list[str] | None = None) -> "LoadedRecipe":
    """Load a recipe file, or the recipe of a run folder with `run.dir` set to that folder."""
    from mtp_lightning.recipe.loading.load import load_recipe
    from mtp_lightning.recipe.yaml import one_line_yaml

    path = Path(recipe)
    if not path.is_dir():
        return load_recipe(path, overrides or [])
    if not (path / "recipe.yaml").is_file():
        raise RunFolderError(
            "a folder given as RECIPE must be a run folder, which holds recipe.yaml",
            f"no recipe.yaml in {path}",
            "Give a recipe file such as recipes/quickstart.yaml, or the folder of an earlier run.",
        )
    return load_recipe(path / "recipe.yaml", [f"run.dir={one_line_yaml(str(path))}", *(overrides or [])])
