"""YAML text and `key=value` overrides to a tree of values; everything wrong on the way is noted as a fault."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, ScalarNode, SequenceNode
from ruamel.yaml.nodes import Node as YamlNode
from ruamel.yaml.reader import ReaderError

from mtp_lightning.errors import Fault
from mtp_lightning.recipe.tree import COMMAND_LINE, Names, Node, merge
from mtp_lightning.recipe.yaml import MOST_DEPTH, TAG_PREFIX, compose, scalar_value

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


FAULTY = object()
MERGE = f"{TAG_PREFIX}merge"
PLAIN_TAGS = (f"{TAG_PREFIX}map", f"{TAG_PREFIX}seq")
MOST_VALUES = 50_000
LONGEST_NUMBER = 1000
_LONE = re.compile(r"[\ud800-\udfff]")
ENDLESS = "brackets nested without end"
FILE_REMEDY = "Check the indentation (spaces, no tabs), the space after each colon, and open quotes or brackets."
ONE_DOCUMENT = "Keep one of them; put the others into files of their own."
PLAIN_PROBLEMS = (
    (r"maximum depth of data structure exceeded .*", ENDLESS),
    (r"found character '\\t' that cannot start any token", "a tab, where only spaces may indent"),
    (r"expected <block end>, but found .*", "a line that is indented unlike its neighbours"),
    (r"but found another document", "a second document, after a line of dashes"),
    (r"found undefined alias '(.*)'", r"*\1, an alias to nothing (text that begins with * needs quotes)"),
    (r"mapping values are not allowed here", "a colon, where no key can stand"),
    (r"expected '.' or '(.)', but got .*", r"a bracket that is not closed by \1"),
    (r"found unexpected end of stream", "quotes that are not closed"),
    (r"could not find expected ':'", "a line without a colon"),
    (r"expected the node content, but found .*", "a value that breaks off"),
    (r"found (.*)", r"\1"),
)


def read_yaml(
    text: str, name: str, faults: list[Fault], *, where: Callable[[int], str], hint: str = FILE_REMEDY
) -> Node | None:
    """Parse YAML into a tree; `where` turns a line number into an origin.

    Return None for a text that is empty, and for one that is at fault, which is noted.
    """
    try:
        root = compose(text)
        return _TreeBuilder(name, faults, where).build(root, ()) if root else None
    except MarkedYAMLError as error:
        found, line = _plain_problem(error), _line_of(error)
    except ReaderError as error:
        found = f"the character {chr(error.character)!a}, which YAML does not allow"
        line = text.count("\n", 0, error.position) + 1
    except RecursionError:  # of keys that are mappings, whose depth is not counted
        found, line = ENDLESS, 1
    except _Flood as flood:
        found, line = flood.args
    origin, hint = where(line), ONE_DOCUMENT if found.startswith("a second document") else hint
    faults.append(Fault(path=name, expected="must be well-formed YAML", found=found, origin=origin, hint=hint))
    return None


def parse_yaml(text: str) -> Any:
    """Parse YAML into plain values, by the rules of recipes.

    Raises:
        ValueError: It is at fault; says how, and in which line.
    """
    faults: list[Fault] = []
    root = read_yaml(text, "the file", faults, where=lambda line: f"line {line}")
    if faults:
        raise ValueError(f"{faults[0].found}, {faults[0].origin}")
    return root.plain() if root else None


def _checked_number(value: Any, node: ScalarNode) -> Any:
    """Raise ValueError for a number of so many digits that Python may not write it out again."""
    if isinstance(value, int | float) and len(node.value) > LONGEST_NUMBER:
        raise ValueError
    return value


class _Flood(Exception):
    """More values, or a deeper nesting, than any file of settings has; what was found, and the line."""


def _plain_problem(error: MarkedYAMLError) -> str:
    problem = error.problem or error.context or "text out of place"
    for pattern, words in PLAIN_PROBLEMS:
        if re.fullmatch(pattern, problem):
            return re.sub(pattern, words, problem)
    return problem.replace("<", "").replace(">", "")


def _line_of(error: MarkedYAMLError) -> int:
    """Return the line to look at: where something was opened, else where reading failed."""
    opened = ("while scanning a simple key", "while scanning a quoted scalar", "while parsing a flow")
    was_opened = (error.context or "").startswith(opened)
    mark = (was_opened and error.context_mark) or error.problem_mark or error.context_mark
    return mark.line + 1 if mark else 1


class _TreeBuilder:
    """Turns ruamel.yaml's nodes into ours; duplicate keys, tags, loops and floods of aliases become faults."""

    def __init__(self, name: str, faults: list[Fault], where: Callable[[int], str]) -> None:
        self.name = name
        self.faults = faults
        self.where = where
        self.open_nodes: list[YamlNode] = []
        self.num_values = 0

    def build(self, node: YamlNode, path: Names, line: int | None = None) -> Node | None:
        """Build the tree below `node`, or None if it is at fault; `line` is that of its key."""
        origin = self.where(line or node.start_mark.line + 1)
        if node in self.open_nodes:
            self.note(path, origin, "must not contain itself", "an alias to an enclosing value", "Undo the loop.")
            return None
        self.num_values += 1
        if len(self.open_nodes) > MOST_DEPTH:
            raise _Flood(ENDLESS, node.start_mark.line + 1)
        if self.num_values > MOST_VALUES:
            raise _Flood(f"more than {MOST_VALUES:,} values, aliases counted each time", node.start_mark.line + 1)
        self.open_nodes.append(node)
        value = self.value(node, path, origin)
        self.open_nodes.pop()
        text = node.value if isinstance(node, ScalarNode) else ""
        return None if value is FAULTY else Node(value, origin, text)

    def value(self, node: YamlNode, path: Names, origin: str) -> object:
        """Build a mapping, a list or a scalar."""
        if isinstance(node, MappingNode) and node.tag in PLAIN_TAGS:
            return self.mapping(node, path)
        if isinstance(node, SequenceNode) and node.tag in PLAIN_TAGS:
            items = [self.build(item, (*path, str(index))) for index, item in enumerate(node.value)]
            return [item for item in items if item]
        found, hint = f"the tag {str(node.tag).replace(TAG_PREFIX, '!!')}", "Remove the tag; put quotes around text."
        if isinstance(node, ScalarNode):
            try:
                if _LONE.search(node.value):
                    found, hint = "half of a character (a lone surrogate), or bytes that are no text", "Take it out."
                else:
                    return _checked_number(scalar_value(node), node)
            except KeyError:
                pass  # the tag is foreign or does not fit
            except ValueError:
                found, hint = f"a number of {len(node.value)} characters", "Shorten it, or put quotes around text."
        self.note(path, origin, "must be a plain value", found, hint)
        return FAULTY

    def mapping(self, node: MappingNode, path: Names) -> dict[str, Node]:
        """Build the entries of a mapping; of a key given twice the first entry is kept.

        Entries that a key `<<` merges come after those that stand there [yaml.org/type/merge.html].
        """
        entries: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            name = _LONE.sub("?", str(key.value)) if isinstance(key, ScalarNode) else "?"
            line = lines.setdefault(name, key.start_mark.line + 1)
            if line != key.start_mark.line + 1 or name in entries:
                found = f"a second entry (the first: {self.where(line)})"
                here = self.where(key.start_mark.line + 1)
                self.note((*path, name), here, "must be given once", found, "Keep one of the two.")
            elif key.tag == MERGE:
                merged = self.merged(value, path, line)
            elif built := self.build(value, (*path, name), line):
                entries[name] = built
        return {**merged, **entries}

    def merged(self, node: YamlNode, path: Names, line: int) -> dict[str, Node]:
        """Build the entries of the mapping, or of the list of mappings, that a merge key names; the first one holds."""
        sources = node.value if isinstance(node, SequenceNode) else [node]
        if not all(isinstance(source, MappingNode) for source in sources):
            found, hint = "another value", "Name one with an alias: `<<: *common`."
            self.note((*path, "<<"), self.where(line), "must merge a mapping, or a list of mappings", found, hint)
            return {}
        built = [self.build(source, path, line) for source in sources]
        return {name: entry for one in reversed(built) if one for name, entry in one.value.items()}

    def note(self, path: Names, origin: str, expected: str, found: str, hint: str) -> None:
        """Note a fault."""
        name = ".".join(path) or self.name
        self.faults.append(Fault(path=name, expected=expected, found=found, origin=origin, hint=hint))
