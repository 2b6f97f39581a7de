"""Which runs a comparison of adaptations consists of, checked as a whole before the first one starts; no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mtp_lightning.errors import CheckpointError, Fault, RecipeError
from mtp_lightning.recipe import Recipe, load_recipe
from mtp_lightning.recipe.loading.phases import phases_of
from mtp_lightning.recipe.yaml import one_line_yaml

RECIPE_NAME = "recipe.yaml"
OWN_FIELDS = {
    "name": "Each recipe brings its own: remove it.",
    "run.dir": "Give --out.",
    "init.path": "It is BASE: remove it.",
    "run.seed": "Give --seeds.",
    "run.restart": "Give another --out.",
}


@dataclass(frozen=True)
class PlannedRun:
    """One recipe with one seed."""

    recipe: Recipe
    folder: Path
    arguments: tuple[str, ...]  # of `mtp train`

    @property
    def name(self) -> str:
        """The recipe's."""
        return self.recipe.name

    @property
    def seed(self) -> int:
        """The run's."""
        return self.recipe.run.seed

    @property
    def title(self) -> str:
        """Recipe and seed in words."""
        return f"{self.name}, seed {self.seed}"

    @cached_property
    def stages(self) -> tuple[Recipe, ...]:
        """The recipes that are trained one after the other: its phases, or itself alone."""
        return tuple(phase.recipe for phase in phases_of(self.recipe)) or (self.recipe,)


def plan_runs(base: Path, arguments: Sequence[str], *, num_seeds: int, out: Path) -> list[PlannedRun]:
    """Lay every recipe over the base's, with every seed; all recipes with their first seed come first.

    Args:
        base: folder that `mtp import` wrote.
        arguments: paths of recipes, and `key=value` for all of them.
        num_seeds: each recipe is trained with seeds 0, 1, ...
        out: folder for the runs.

    Raises:
        CheckpointError: The base is not one.
        RecipeError: Names all faults of all recipes; or there is none, or two have the same name.
    """
    if not (base / RECIPE_NAME).is_file():
        raise CheckpointError(
            "BASE must be a model with a recipe to train it, as `mtp import MODEL --out BASE` writes it",
            f"no {RECIPE_NAME} in {base}" if base.is_dir() else f"no folder {base}",
            "Import the model that all recipes shall start from, and give that folder",
        )
    paths = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    faults = _faults_of_command(paths, overrides)
    runs: list[PlannedRun] = []
    for seed in range(num_seeds):
        for path in dict.fromkeys(paths):
            try:
                runs.append(_planned(base, path, overrides, seed, out))
            except RecipeError as error:
                faults += [fault for fault in error.faults if fault not in faults]
    if not faults:
        faults = _faults_of_names({run.arguments[1]: run for run in runs})
    if faults:
        raise RecipeError(faults)
    return runs


def most_offsets(runs: Sequence[PlannedRun]) -> int:
    """Return the largest number of offsets that a run ends with, at least 2."""
    return max(2, *(run.stages[-1].heads.num_offsets for run in runs))


def _planned(base: Path, path: str, overrides: Sequence[str], seed: int, out: Path) -> PlannedRun:
    common = (*overrides, f"init.path={one_line_yaml(str(base))}", f"run.seed={seed}", "run.restart=false")
    name = load_recipe(base / RECIPE_NAME, [path, *common]).recipe.name
    folder = out / f"{_folder_name(name)}-{seed}"
    arguments = (str(base / RECIPE_NAME), path, *common, f"run.dir={one_line_yaml(str(folder))}")
    return PlannedRun(load_recipe(arguments[0], arguments[1:]).recipe, folder, arguments)


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.+-]", "_", name)


def _faults_of_command(paths: Sequence[str], overrides: Sequence[str]) -> list[Fault]:
    """Name what is wrong before a recipe is read."""
    faults = [
        Fault(
            path=key,
            expected="must be left to the comparison",
            found=override,
            origin="command line",
            hint=OWN_FIELDS[key],
        )
        for override in overrides
        if (key := override.partition("=")[0].strip()) in OWN_FIELDS
    ]
    if not paths:
        faults.append(
            Fault(
                path="RECIPE",
                expected="must be given at least once",
                found=f"none beside {' '.join(overrides)}" if overrides else "none",
                origin="command line",
                hint="Give the recipes to compare, e.g. recipes/adapt/joint.yaml recipes/adapt/heads_only.yaml.",
            )
        )
    for path in sorted({path for path in paths if paths.count(path) > 1}):
        faults.append(_twins("RECIPE", path, "command line", "Give it once; --seeds repeats a run with other seeds."))
    return faults


def _faults_of_names(runs: dict[str, PlannedRun]) -> list[Fault]:
    """Name recipes that would share a row of the table, and a folder."""
    named: dict[str, list[str]] = {}
    for path, run in runs.items():
        named.setdefault(_folder_name(run.name), []).append(path)
    return [
        _twins("name", f"{name} in {' and in '.join(paths)}", paths[-1], f"Give {paths[-1]} another name: name: …")
        for name, paths in named.items()
        if len(paths) > 1
    ]


def _twins(path: str, found: str, origin: str, hint: str) -> Fault:
    return Fault(path=path, expected="must differ between the recipes compared", found=found, origin=origin, hint=hint)
