"""Recipes on the screen: resolved, checked, compared."""

import textwrap
from pathlib import Path

from rich.text import Text

from mtp_lightning.cli.recipe_argument import open_recipe
from mtp_lightning.console.errors import screen
from mtp_lightning.errors import Fault, RecipeError
from mtp_lightning.files.paths import leads_to
from mtp_lightning.recipe.diff import diff_recipes
from mtp_lightning.recipe.learning_rate import learning_rate
from mtp_lightning.recipe.loading.dump import yaml_lines
from mtp_lightning.recipe.loading.load import LoadedRecipe
from mtp_lightning.recipe.loading.phases import phases_of
from mtp_lightning.recipe.schema.describe import shortened
from mtp_lightning.recipe.schema.field_types import place_at
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.yaml import one_line_yaml

ORIGIN_COLUMN = 44
NARROWEST = 20
NO_RECIPE = Fault(
    path="RECIPE",
    expected="must be given at least once",
    found="fields to change only",
    origin="command line",
    hint="Give one or more recipe files, e.g. recipes/quickstart.yaml.",
)


def print_recipe(recipe: str, overrides: list[str] | None, *, with_origins: bool, with_docs: bool) -> None:
    """Print a resolved recipe, each field with its meaning above it and its origin behind it where asked for."""
    loaded = open_recipe(recipe, overrides)
    console = screen()
    for line, path in yaml_lines(loaded.recipe):
        for comment in _doc_comments(path, line, console.width) if with_docs else ():
            console.print(comment)
        console.print(_with_origin(line, loaded, path) if with_origins else _coloured(line))


def plot_learning_rate(recipe: str, overrides: list[str] | None) -> None:
    """Draw the learning rate of every step of a recipe, or of each of its phases."""
    from mtp_lightning.console.plots import SAMPLES, text_plot

    whole, console = open_recipe(recipe, overrides).recipe, screen()
    for title, each in [(phase.title, phase.recipe) for phase in phases_of(whole)] or [(whole.name, whole)]:
        section, steps = each.optimizer, each.run.steps
        shown = sorted({round(place * (steps - 1) / (SAMPLES - 1)) for place in range(SAMPLES)})
        rates = [learning_rate(section, step, steps) for step in shown]
        console.print(Text(f"{title}: {section.schedule}, peak {section.lr:g}, last {rates[-1]:.4g}"))
        for line in text_plot(rates, "step 1", f"{steps:,}"):
            console.print(Text(line), soft_wrap=True)
        scales = ", ".join(f"{role} x {factor:g}" for role, factor in section.lr_scale.items())
        if scales:
            console.print(Text(f"optimizer.lr_scale: {scales}"))
        if section.mup_base_width is not None:
            factor = section.mup_base_width / each.model.hidden_size
            console.print(Text(f"optimizer.mup_base_width: matrices of layers and unembedding x {factor:g}"))


def _coloured(line: str) -> Text:
    key, colon, value = line.partition(":")
    return Text.assemble((key, "blue"), colon, value)


def _with_origin(line: str, loaded: LoadedRecipe, path: str) -> Text:
    origin = loaded.origins.get(path)
    if origin is None:
        return _coloured(line)
    style = "dim" if origin == "default" else "green"
    padding = " " * max(ORIGIN_COLUMN - len(line), 1)
    return Text.assemble(_coloured(line), padding, (f"# {origin}", style))


def _doc_comments(path: str, line: str, width: int) -> list[Text]:
    place = place_at(path.split("."))
    words = place.field.description if place and place.field else None
    indent = " " * (len(line) - len(line.lstrip()))
    room = max(width - len(indent) - 2, NARROWEST)
    comments = [Text(f"{indent}# {part}", style="dim") for part in textwrap.wrap(words or "", room)]
    return [Text(), *comments] if line.endswith(":") else comments


def print_verdicts(arguments: list[str]) -> None:
    """Print a line for each recipe among the arguments, the others being overrides; raise all faults together."""
    overrides = [argument for argument in arguments if "=" in argument and not leads_to(Path(argument))]
    files = [argument for argument in arguments if argument not in overrides]
    if not files:
        raise RecipeError([NO_RECIPE])
    faults: dict[Fault, None] = {}
    console = screen()
    for file in files:
        own: list[Fault] = []
        try:  # once: a file may be a pipe
            warning = _warning(file, open_recipe(file, overrides).recipe)
        except RecipeError as error:
            own, warning = error.faults, None
        faults.update(dict.fromkeys(own))
        if warning:
            screen(stderr=True).print(warning)
        verdict = Text.assemble(("faulty  ", "bold red"), file, f"  ({len(own)})") if own else None
        console.print(verdict or Text.assemble(("ok      ", "green"), file))
    if faults:
        raise RecipeError(list(faults))


def _warning(file: str, recipe: Recipe) -> str | None:
    """Say of a sound recipe that neither this machine nor any known GPU could hold a rank's part of it."""
    from mtp_lightning.planner.hardware import hardware, known_hardware
    from mtp_lightning.planner.machine_memory import host_bytes, least_bytes
    from mtp_lightning.planner.memory import GIB

    on_device, _ = least_bytes(recipe)
    gpus = {} if recipe.run.device == "cpu" else {name: hardware(name).memory_bytes for name in known_hardware()}
    largest, there = max({"this machine": host_bytes(), **gpus}.items(), key=lambda item: item[1])
    if on_device <= there:
        return None
    return (
        f"warning: {file}: weights and optimizer state take {on_device / GIB:,.1f} GiB per rank, more than the "
        f"{there / GIB:,.1f} GiB of {largest}; "
        "`mtp plan` shows what would fit, and `mtp train` refuses it where it does not"
    )


def print_differences(a: str, b: str) -> None:
    """Print a line for each field in which two recipes differ."""
    differences = diff_recipes(open_recipe(a).recipe, open_recipe(b).recipe)
    console = screen()
    if not differences:
        console.print("no field differs")
    width = max((len(difference.path) for difference in differences), default=0)
    for difference in differences:
        old, new = (shortened(one_line_yaml(value)) for value in (difference.a, difference.b))
        console.print(Text.assemble(f"{difference.path:<{width}}  ", (old, "red"), " -> ", (new, "green")))
