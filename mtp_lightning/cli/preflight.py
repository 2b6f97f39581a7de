"""`mtp preflight`."""

import os
import sys

import typer

from mtp_lightning.cli.recipe_argument import OverridesArgument, RecipeArgument, open_recipe


def preflight(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Check on the nodes themselves that a recipe will run: versions, devices, network, folders, data, two steps."""
    loaded = open_recipe(recipe, overrides)
    from mtp_lightning.launch.local import needs_ranks, run_ranks

    if needs_ranks(loaded.recipe, os.environ):
        raise typer.Exit(run_ranks(loaded.recipe, sys.argv[1:]))
    from mtp_lightning.diagnostics.preflight import preflight

    raise typer.Exit(preflight(loaded.recipe))
