"""A recipe on its way in: plain values in which each remembers the line it was written on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

COMMAND_LINE = "command line"  # as an origin
Names = tuple[str, ...]


@dataclass(frozen=True)
class Node:
    """One value with its origin: a scalar, a list of nodes, or a mapping of nodes."""

    value: Any
    origin: str
    text: str = field(default="", repr=False, compare=False)  # of a scalar, as it was written

    def plain(self) -> Any:
        """Return the value without origins."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value

    def child(self, name: str) -> "Node | None":
        """Return the entry of a mapping, the item of a list, or None."""
        if isinstance(self.value, dict):
            return self.value.get(name)
        if isinstance(self.value, list) and name.isdecimal() and int(name) < len(self.value):
            item: Node = self.value[int(name)]
            return item
        return None

    def at(self, names: Names) -> "Node | None":
        """Return the value at a path, or None when no one wrote it."""
        node: Node | None = self
        for name in names:
            node = node.child(name) if node else None
        return node

    def origin_at(self, names: Names) -> str | None:
        """Return where the value at a path was written, or None when no one wrote it."""
        node = self.at(names)
        return node.origin if node else None

    def origins_below(self) -> Iterator[str]:
        """Yield the origins of all scalars and lists, the node's own if it is one."""
        if isinstance(self.value, dict) and self.value:
            for child in self.value.values():
                yield from child.origins_below()
        else:
            yield self.origin


def node_of(value: Any, origin: str) -> Node:
    """Return plain values as a tree, all of one origin.

    >>> node_of({"a": [1]}, "here").at(("a", "0"))
    Node(value=1, origin='here')
    """
    if isinstance(value, dict):
        return Node({name: node_of(entry, origin) for name, entry in value.items()}, origin)
    return Node([node_of(item, origin) for item in value] if isinstance(value, list) else value, origin)


Replaces = Callable[[Names, Node, Node], bool]


def merge(base: Node, top: Node, *, replaces: Replaces | None = None, names: Names = ()) -> Node:
    """Lay `top` over `base`: mappings merge entry by entry, anything else is replaced.

    `replaces(names, base, top)` says where a mapping must not merge: a union whose kind changes.
    """
    both = isinstance(base.value, dict) and isinstance(top.value, dict)
    if not both or (replaces and replaces(names, base, top)):
        return top
    entries = dict(base.value)
    for name, entry in top.value.items():
        below = entries.get(name)
        entries[name] = merge(below, entry, replaces=replaces, names=(*names, name)) if below else entry
    return Node(entries, top.origin)
