"""Head kinds beyond the package's own: by `register_head`, or by the entry points of installed packages."""

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

BUILT_IN = ("parallel", "linear", "chained", "sequential", "recursive", "medusa")
GROUP = "mtp_lightning.heads"  # of entry points: the name of a kind = the class of its heads


class HeadKind(Protocol):
    """Answers of a class of heads, without an instance; see `model/heads/base.py`."""

    def parent(self, heads: Any, offset: int) -> int:
        """Return the offset whose state an offset reads, 0 for the trunk's output."""

    def num_layers(self, heads: Any, offset: int) -> int:
        """Count the transformer layers of an offset."""

    def weights_beside_layers(self, model: Any, heads: Any, offset: int) -> tuple[int, int]:
        """Count the entries of an offset's matrices and vectors outside of transformer layers."""


_registered: dict[str, HeadKind] = {}


def register(name: str, kind: HeadKind) -> None:
    """Make a kind known under a name, in this process; whoever registers it again replaces it.

    Raises:
        ValueError: The name is a built-in kind's, or not a name.
    """
    if name in BUILT_IN or not name.isidentifier():
        raise ValueError(f"a head kind of one's own needs a name that is free and an identifier; found {name!r}")
    _registered[name] = kind


def registered(name: str) -> HeadKind | None:
    """Return a kind beyond the package's own, loading its entry point if need be; else None."""
    if name not in _registered and name not in BUILT_IN and name in (found := _entry_points()):
        register(name, found[name].load())
    return _registered.get(name)


def head_kinds() -> tuple[str, ...]:
    """List the names that `heads.kind` may have."""
    return (*BUILT_IN, *sorted({*_registered, *_entry_points()} - {*BUILT_IN}))


@cache
def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}
