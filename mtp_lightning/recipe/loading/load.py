"""From a file, its parents and the command line to a recipe, or to all of its faults at once."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mtp_lightning.errors import Fault, RecipeError
from mtp_lightning.files.paths import expanded, leads_to, remedy_for
from mtp_lightning.recipe.diff import origins_of
from mtp_lightning.recipe.loading.parse import read_overrides, read_yaml
from mtp_lightning.recipe.loading.phases import check_phases, unknown_names_in_phases
from mtp_lightning.recipe.loading.tiny import SHRUNK, shrinking
from mtp_lightning.recipe.loading.validate import Checked, check_fields
from mtp_lightning.recipe.rules.all import check_rules
from mtp_lightning.recipe.schema.describe import found
from mtp_lightning.recipe.schema.field_types import changes_kind, place_at
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.tree import COMMAND_LINE, Node, merge, node_of

Chain = tuple[Path, ...]
MOST_CHARACTERS = 2**22


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
    return _whole(tree, written, faults, is_whole=is_whole)


def _whole(tree: Node, written: Node, faults: list[Fault], *, is_whole: bool) -> LoadedRecipe:
    """Check values with overrides over them, and everything that rules say of them; `faults` are known already."""
    suspects = {fault.path for fault in faults}
    tree, checked = _checked(tree, written)
    origins = origins_of(checked.recipe, tree)
    faults += checked.faults
    if is_whole:
        faults += check_rules(checked.recipe, origins=origins, suspects=suspects | checked.suspects)
    faults_of_phases = unknown_names_in_phases(tree) if faults else check_phases(checked.recipe, tree)
    if faults := [*faults, *faults_of_phases]:  # a phase would repeat other faults of the recipe as a whole
        raise _error(sorted(faults, key=_line))
    return LoadedRecipe(checked.recipe, origins)


RecipeLike = Recipe | LoadedRecipe | str | Path | Mapping[str, Any]
IN_PYTHON = "given in Python"  # as an origin


def as_recipe(recipe: RecipeLike) -> Recipe:
    """Return the recipe of a recipe, of a loaded one, of a recipe file's path, or of plain values.

    Raises:
        RecipeError: The file or the values have faults, or it is something else.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, LoadedRecipe):
        return recipe.recipe
    if isinstance(recipe, str | Path):
        return load_recipe(recipe).recipe
    if isinstance(recipe, Mapping):
        return _whole(node_of(dict(recipe), IN_PYTHON), Node({}, COMMAND_LINE), [], is_whole=True).recipe
    fault = Fault(
        path="recipe",
        expected="must be a recipe, the path of one, or a mapping of its sections",
        found=f"a {type(recipe).__name__}",
        origin=IN_PYTHON,
        hint='Give load_recipe("recipes/quickstart.yaml", ["run.steps=20"]), from mtp_lightning.',
    )
    raise RecipeError([fault])


def read_recipe_files(path: Path, faults: list[Fault], children: Chain = ()) -> Node:
    """Read a recipe file and the parents it extends, each child laid over its parent.

    A file that cannot be read counts as empty, and the reason is noted as a fault.
    """
    root = _read_mapping(path, faults)
    entries = dict(root.value)
    extends = entries.pop("extends", None)
    own = Node(entries, root.origin)
    parent = _parent_path(extends, (*children, path), faults) if extends else None
    if parent is None:
        return own
    return merge(read_recipe_files(parent, faults, (*children, path)), own, replaces=changes_kind)


def is_recipe_path(argument: str) -> bool:
    """Tell whether an argument among fields to change is another recipe, to be laid over the first.

    >>> is_recipe_path("recipes/adapt/joint.yaml"), is_recipe_path("run.dir=a.yaml")
    (True, False)
    """
    return "=" not in argument and argument.endswith((".yaml", ".yml"))


def _read_mapping(path: Path, faults: list[Fault]) -> Node:
    """Return the mapping that a file holds, or an empty one and a fault."""
    nothing = Node({}, str(path))
    text = _read_text(path, faults)
    if text is None:
        return nothing
    num_faults = len(faults)
    root = read_yaml(text, str(path), faults, where=lambda line: f"{path}:{line}")
    if root and isinstance(root.value, dict):
        return root
    if len(faults) == num_faults:
        fault = Fault(
            path=str(path),
            expected="must hold a mapping of sections (model, heads, data, run, ...)",
            found=found(root.plain()) if root else "an empty file",
            origin=root.origin if root else f"{path}:1",
            hint="Write e.g. `run:` and beneath it, indented, `steps: 200`.",
        )
        faults.append(fault)
    return nothing


def _read_text(path: Path, faults: list[Fault]) -> str | None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO nobody writes to is empty
        os.set_blocking(handle, True)
        with os.fdopen(handle, encoding="utf-8") as file:
            text = file.read(MOST_CHARACTERS + 1)
        if len(text) <= MOST_CHARACTERS:
            return text
        reason = f"more than {MOST_CHARACTERS:,} characters"
    except UnicodeDecodeError:
        reason = "bytes that are not UTF-8 text"
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    except ValueError:
        reason = "a name that no file can have"
    meant = nearest_file(path)
    hint = f"Give {meant}, if that was meant." if meant else "Give the path of a recipe file."
    fault = Fault(
        path=str(path),
        expected="must be a recipe: a YAML file that can be read",
        found=reason,
        origin=str(path),
        nearest=meant,
        hint="Save it as UTF-8, if it is a recipe." if "UTF-8" in reason else hint,
    )
    faults.append(fault)
    return None


def _parent_path(extends: Node, chain: Chain, faults: list[Fault]) -> Path | None:
    """Return the path of the parent that the last file of the chain extends, or note why there is none."""
    is_text = isinstance(extends.value, str)
    parent = Path(os.path.normpath(chain[-1].parent / expanded(extends.value))) if is_text else None
    meant = None
    if parent is None:
        reason, hint = found(extends.plain()), "Write one path; a parent may extend a parent of its own."
    elif remedy := remedy_for(str(parent)):
        reason, hint = found(extends.plain()), remedy
    elif not leads_to(parent, Path.is_file):
        meant = nearest_file(parent)
        reason, hint = f"no file {parent}", f"Name {meant}, if that was meant." if meant else "Correct the path."
    elif os.path.realpath(parent) in map(os.path.realpath, chain):
        reason, hint = f"a circle: {' -> '.join(map(str, (*chain, parent)))}", "Remove one of its extends lines."
    else:
        return parent
    fault = Fault(
        path="extends",
        expected="must be the path of one other recipe, relative to this file",
        found=reason,
        origin=extends.origin,
        nearest=meant,
        hint=hint,
    )
    faults.append(fault)
    return None


def nearest_file(path: Path) -> str | None:
    """Return the recipe file whose name looks most like that of a path that leads nowhere."""
    if leads_to(path) or remedy_for(str(path)):
        return None
    if os.path.lexists(path):
        return None  # a link in a circle, or to nothing
    files = sorted({*path.parent.glob("*.yaml"), *Path("recipes").rglob("*.yaml")})
    stems = get_close_matches(path.stem, [file.stem for file in files], n=1, cutoff=0.7)
    return next((str(file) for file in files if file.stem in stems), None)


def _checked(files: Node, overrides: Node) -> tuple[Node, Checked]:
    """Lay overrides over files and check the fields; a recipe that asks to be shrunk is shrunk in between."""
    tree = merge(files, overrides, replaces=changes_kind)
    checked = check_fields(tree)
    if checked.recipe.debug.shrink:
        small = merge(files, shrinking(checked.recipe), replaces=changes_kind)
        tree = merge(merge(small, overrides, replaces=changes_kind), SHRUNK)
        checked = check_fields(tree)
    return tree, checked


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
