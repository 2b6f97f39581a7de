"""`mtp plan`."""

from pathlib import Path
from typing import Annotated

import typer

from mtp_lightning.cli.recipe_argument import OverridesArgument, RecipeArgument, open_recipe
from mtp_lightning.cli.targets import check_file_or_stdout


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    gpu: Annotated[str, typer.Option(help="Type of GPU: A100-40, A100-80, H100, H200 or B200.")] = "H100",
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Number of GPUs (as the recipe's strategy says, unless given).")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            callback=check_file_or_stdout,
            help="Write the figures here, too; - is stdout, then without tables.",
        ),
    ] = None,
) -> None:
    """Work out memory, time and cost of a run, phase by phase, before it starts; needs no GPU and no torch."""
    loaded = open_recipe(recipe, overrides)
    from mtp_lightning.cli.plan_view import print_plan, write_plans
    from mtp_lightning.console.tables import STDOUT
    from mtp_lightning.planner.report import build_plan
    from mtp_lightning.recipe.loading.phases import phases_of

    recipes = [phase.recipe for phase in phases_of(loaded.recipe)] or [loaded.recipe]
    made = [build_plan(each, gpu, gpus) for each in recipes]
    for each in made if json != STDOUT else []:  # the figures are then all that is printed
        print_plan(each)
    if json:
        write_plans(made, json)
