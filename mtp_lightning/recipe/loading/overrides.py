"""`key=value` on the command line: a dotted path, and a value written in YAML."""

from collections.abc import Iterable

from mtp_lightning.errors import Fault
from mtp_lightning.recipe.loading.parse import read_yaml
from mtp_lightning.recipe.tree import Node, merge

COMMAND_LINE = "command line"
SHELL_REMEDY = "Close brackets and quotes, and put the whole argument in quotes for the shell."
EXAMPLE = "run.steps=200"


def read_overrides(overrides: Iterable[str], faults: list[Fault]) -> Node:
    """Gather all overrides into one tree; of two for the same field the later holds.

    >>> read_overrides(["run.steps=20", "optimizer.lr=3e-4"], []).plain()
    {'run': {'steps': 20}, 'optimizer': {'lr': 0.0003}}
    """
    tree = Node({}, COMMAND_LINE)
    for override in overrides:
        tree = merge(tree, _read_override(override, faults))
    return tree


def _read_override(override: str, faults: list[Fault]) -> Node:
    """Return a tree with one leaf, or an empty tree and a fault."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals:
        return _refuse(override, "must be written key=value", "no equals sign", f"Write e.g. {EXAMPLE}.", faults)
    if not all(names):
        found = f"the path {key!r}" if key.strip() else "nothing before the equals sign"
        return _refuse(override, "must name a field by a dotted path", found, f"Write e.g. {EXAMPLE}.", faults)
    if names == ["extends"]:
        hint = "Make a recipe file with this line, or give its fields as overrides."
        return _refuse(key, "must stand in a recipe file", "extends among the overrides", hint, faults)
    num_faults = len(faults)
    node = read_yaml(text, key, faults, where=lambda _: COMMAND_LINE, hint=SHELL_REMEDY)
    if node is None and len(faults) == num_faults:
        hint = f"Write a value, or {key}=null if none is meant."
        return _refuse(key, "must have a value after the equals sign", "nothing", hint, faults)
    for name in reversed(names) if node else ():
        node = Node({name: node}, COMMAND_LINE)
    return node or Node({}, COMMAND_LINE)


def _refuse(path: str, expected: str, found: str, hint: str, faults: list[Fault]) -> Node:
    faults.append(Fault(path=path, expected=expected, found=found, origin=COMMAND_LINE, hint=hint))
    return Node({}, COMMAND_LINE)
