"""`mtp recipe show | check | diff`."""

from typing import Annotated

import typer

from mtp_lightning.cli.recipe_argument import OverridesArgument, RecipeArgument

app = typer.Typer(no_args_is_help=True, help="Show, check and compare recipes.")


@app.command()
def show(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    *,
    origin: Annotated[bool, typer.Option("--origin", help="Say of each value where it comes from.")] = False,
    docs: Annotated[bool, typer.Option("--docs", help="Say of each field what it means.")] = False,
    plot_lr: Annotated[
        bool, typer.Option("--plot-lr", help="Draw the learning rate over the steps, of each phase, in its place.")
    ] = False,
) -> None:
    """Print the resolved recipe: every field, as YAML that is itself a valid recipe."""
    from mtp_lightning.cli.recipe_view import plot_learning_rate, print_recipe

    if plot_lr:
        plot_learning_rate(recipe, overrides)
        return
    print_recipe(recipe, overrides, with_origins=origin, with_docs=docs)


@app.command()
def check(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE | KEY=VALUE", help="Recipes, and fields to change in all of them."),
    ],
) -> None:
    """Check recipes: a line for each, then every fault of the faulty ones. Exit code 2 if there are any."""
    from mtp_lightning.cli.recipe_view import print_verdicts

    print_verdicts(recipes)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A recipe file or run folder.", show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.", show_default=False)],
) -> None:
    """Print the fields in which two resolved recipes differ."""
    from mtp_lightning.cli.recipe_view import print_differences

    print_differences(a, b)
