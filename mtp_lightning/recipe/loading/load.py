"""From a file, its parents and the command line to a recipe, or to all of its faults at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtp_lightning.errors import Fault, RecipeError
from mtp_lightning.recipe.diff import leaves
from mtp_lightning.recipe.loading.files import is_recipe_path, read_recipe_files
from mtp_lightning.recipe.loading.overrides import read_overrides
from mtp_lightning.recipe.loading.phases import check_phases
from mtp_lightning.recipe.loading.tiny import SHRUNK, shrinking
from mtp_lightning.recipe.loading.validate import Checked, check_fields
from mtp_lightning.recipe.rules.all import check_rules
from mtp_lightning.recipe.schema.field_types import changes_kind, place_at
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.tree import Node, merge


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, and for the dotted path of every field the place its value came from."""

    recipe: Recipe
    origins: Mapping[str, str]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe file with its parents, lay `key=value` overrides over it, and check the whole.

    An override that is the path of another recipe is laid over the file with all its fields, before any `key=value`.
    Raise `RecipeError` with every fault that was found.
    """
    faults: list[Fault] = []
    tree = read_recipe_files(Path(path), faults)
    for laid in filter(is_recipe_path, overrides):
        tree = merge(tree, read_recipe_files(Path(laid), faults), replaces=changes_kind)
    is_whole = all(place_at(fault.path.split(".")) for fault in faults)  # else a file is missing: rules would mislead
    written = read_overrides([override for override in overrides if not is_recipe_path(override)], faults)
    suspects = {fault.path for fault in faults}
    tree, checked = _checked(tree, written)
    origins = origins_of(checked.recipe, tree)
    faults += checked.faults
    if is_whole:
        faults += check_rules(checked.recipe, origins=origins, suspects=suspects | checked.suspects)
    if not faults:  # of the recipe as a whole, which every phase would repeat
        faults += check_phases(checked.recipe, tree)
    if faults:
        raise _error(sorted(faults, key=_line))
    return LoadedRecipe(checked.recipe, origins)


def _checked(files: Node, overrides: Node) -> tuple[Node, Checked]:
    """Lay overrides over files and check the fields; a recipe that asks to be shrunk is shrunk in between."""
    tree = merge(files, overrides, replaces=changes_kind)
    checked = check_fields(tree)
    if checked.recipe.debug.shrink:
        small = merge(files, shrinking(checked.recipe), replaces=changes_kind)
        tree = merge(merge(small, overrides, replaces=changes_kind), SHRUNK)
        checked = check_fields(tree)
    return tree, checked


def origins_of(recipe: Recipe, tree: Node) -> dict[str, str]:
    """Say for every field where its value was written; `default` where nowhere."""
    origins = {}
    for name in leaves(recipe):
        node = tree.at(tuple(name.split(".")))
        origins[name] = ", ".join(dict.fromkeys(node.origins_below())) if node else "default"
    return origins


def _line(fault: Fault) -> tuple[bool, str, int]:
    """Sort faults by file and line, those of the command line and of defaults last."""
    file, _, line = fault.origin.partition(",")[0].rpartition(":")
    return (not file, file, int(line) if line.isdecimal() else 0)


def fault_lines(fault: Fault) -> list[str]:
    """Write a fault as lines of text, the first a sentence.

    >>> fault_lines(Fault(path="run.steps", expected="must be > 0", found="0", origin="x.yaml:3", hint="Raise it."))
    ['run.steps must be > 0', 'found: 0', 'where: x.yaml:3', 'hint: Raise it.']
    """
    lines = [f"{fault.path} {fault.expected}", f"found: {fault.found}", f"where: {fault.origin}"]
    return [*lines, *([f"nearest: {fault.nearest}"] if fault.nearest else []), f"hint: {fault.hint}"]


def _error(faults: list[Fault]) -> RecipeError:
    """Build the error; its notes spell the faults out where no command line does."""
    error = RecipeError(faults)
    for fault in faults:
        error.add_note("\n  ".join(fault_lines(fault)))
    return error
