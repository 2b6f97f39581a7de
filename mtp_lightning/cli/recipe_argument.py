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
        help="Fields to change, e.g. run.steps=200 run.dir=runs/mine; a recipe file among them is laid over RECIPE.",
        show_default=False,
    ),
]


def open_recipe(recipe: str, overrides: list[str] | None = None) -> "LoadedRecipe":
    """Load a recipe file, or the recipe of a run folder with `run.dir` set to that folder."""
    from mtp_lightning.recipe.loading.load import is_so, load_recipe
    from mtp_lightning.recipe.yaml import one_line_yaml

    path = Path(recipe)
    if not is_so(path.is_dir):
        return load_recipe(path, overrides or [])
    if not (path / "recipe.yaml").is_file():
        raise RunFolderError(
            "a folder given as RECIPE must be a run folder, which holds recipe.yaml",
            f"no recipe.yaml in {path}",
            "Give a recipe file such as recipes/quickstart.yaml, or the folder of an earlier run.",
        )
    return load_recipe(path / "recipe.yaml", [f"run.dir={one_line_yaml(str(path))}", *(overrides or [])])


def open_runs(paths: list[Path]) -> list[Path]:
    """Return the folders given, in place of a sweep's its finished runs; the others are named on stderr."""
    from mtp_lightning.console.errors import screen
    from mtp_lightning.launch.status import statuses
    from mtp_lightning.launch.sweep import members_of

    runs: list[Path] = []
    for path in paths:
        members = members_of(path)
        finished = {run.path for run in statuses(members) if run.is_finished}
        runs += [member for member in members if member in finished] if members else [path]
        if left := [str(member) for member in members if member not in finished]:
            screen(stderr=True).print(f"not finished, and left out: {', '.join(left)}", soft_wrap=True)
    if not runs:
        raise RunFolderError("a sweep must have finished runs", f"none in {paths[0]}", "Give mtp sweep again.")
    return runs
