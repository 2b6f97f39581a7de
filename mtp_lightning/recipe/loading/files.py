"""Recipe files and the one parent that each may extend."""

import os
from difflib import get_close_matches
from pathlib import Path

from mtp_lightning.errors import Fault
from mtp_lightning.recipe.loading.parse import read_yaml
from mtp_lightning.recipe.schema.describe import found
from mtp_lightning.recipe.schema.field_types import changes_kind
from mtp_lightning.recipe.tree import Node, merge

Chain = tuple[Path, ...]


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
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        reason = "bytes that are not UTF-8 text"
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    meant = nearest_file(path)
    fault = Fault(
        path=str(path),
        expected="must be a recipe: a YAML file that can be read",
        found=reason,
        origin=str(path),
        nearest=meant,
        hint=f"Give {meant}, if that was meant." if meant else "Give the path of a recipe file.",
    )
    faults.append(fault)
    return None


def _parent_path(extends: Node, chain: Chain, faults: list[Fault]) -> Path | None:
    """Return the path of the parent that the last file of the chain extends, or note why there is none."""
    is_text = isinstance(extends.value, str)
    parent = Path(os.path.normpath(chain[-1].parent / extends.value)) if is_text else None
    meant = None
    if parent is None:
        reason, hint = found(extends.plain()), "Write one path; a parent may extend a parent of its own."
    elif parent.resolve() in [file.resolve() for file in chain]:
        reason, hint = f"a circle: {' -> '.join(map(str, (*chain, parent)))}", "Remove one of its extends lines."
    elif not parent.is_file():
        meant = nearest_file(parent)
        reason, hint = f"no file {parent}", f"Name {meant}, if that was meant." if meant else "Correct the path."
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
    if path.exists():
        return None
    files = sorted({*path.parent.glob("*.yaml"), *Path("recipes").rglob("*.yaml")})
    stems = get_close_matches(path.stem, [file.stem for file in files], n=1, cutoff=0.7)
    return next((str(file) for file in files if file.stem in stems), None)
