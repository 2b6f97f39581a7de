"""What the sections allow at a path: asked when recipes are merged, checked and shown."""

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from mtp_lightning.recipe.schema.base import Choices, Section
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.tree import Names, Node


@dataclass(frozen=True)
class Option:
    """One type that a value may have, with its limits (`Ge(1)`, `MinLen(2)`, …)."""

    type: Any
    limits: tuple[Any, ...] = ()

    @property
    def section(self) -> type[Section] | None:
        """The section, if this is one."""
        is_section = isinstance(self.type, type) and issubclass(self.type, Section)
        return self.type if is_section else None

    @property
    def choices(self) -> tuple[str, ...]:
        """The words, if this is a choice of words."""
        if get_origin(self.type) is Literal:
            return get_args(self.type)
        return next((limit.names() for limit in self.limits if isinstance(limit, Choices)), ())

    @property
    def entry(self) -> Any:
        """The annotation of an entry, if this is a list or a mapping with fixed keys."""
        return get_args(self.type)[-1] if get_origin(self.type) in (list, dict) else None

    @property
    def keys(self) -> tuple[str, ...]:
        """The names that may stand below: fields of a section, or keys of a mapping."""
        if self.section:
            return tuple(self.section.model_fields)
        return get_args(get_args(self.type)[0]) if get_origin(self.type) is dict else ()


def options_of(annotation: Any, limits: Sequence[Any] = ()) -> tuple[Option, ...]:
    """Split an annotation into the types it allows."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(option for part in get_args(annotation) for option in options_of(part, limits))
    if get_origin(annotation) is Annotated:
        inner, *extras = get_args(annotation)
        own = [limit for extra in extras for limit in (extra.metadata if isinstance(extra, FieldInfo) else [extra])]
        return options_of(inner, (*limits, *own))
    return (Option(annotation, tuple(limits)),)


@dataclass(frozen=True)
class Place:
    """A position in a recipe, and what may stand there."""

    names: Names
    options: tuple[Option, ...]
    field: FieldInfo | None = None

    @property
    def kinds(self) -> dict[str, type[Section]]:
        """Sections told apart by their `kind`; empty where there are not several."""
        sections = [option.section for option in self.options if option.section]
        if len(sections) < 2:
            return {}
        return {get_args(section.model_fields["kind"].annotation)[0]: section for section in sections}

    @property
    def keys(self) -> tuple[str, ...]:
        """The names that may stand below this place."""
        return tuple(key for option in self.options for key in option.keys)

    def below(self, name: str) -> "Place | None":
        """Return the place of a field, entry or item, or None if there cannot be one of this name."""
        names = (*self.names, name)
        for option in self.options:
            if option.section and name in option.keys:
                field = option.section.model_fields[name]
                return Place(names, options_of(field.annotation, field.metadata), field)
            if option.entry and (name in option.keys or not option.keys):
                return Place(names, options_of(option.entry))
            if option.type is Any:
                return Place(names, (option,))
        return None


ROOT = Place((), (Option(Recipe),))


def place_at(names: Sequence[str]) -> Place | None:
    """Return what may stand at a path, or None if the schema has no such path."""
    place: Place | None = ROOT
    for name in names:
        place = place.below(name) if place else None
    return place


def follow(location: Sequence[str | int]) -> tuple[Names, Place | None, Place | None]:
    """Turn a location of pydantic's, which names the kind chosen in a union, into the path that a user writes.

    Return that path, the place that holds its last name, and the place itself (None: the schema has no such path).

    >>> follow(("objective", "weights", "decay", "beta"))[0]
    ('objective', 'weights', 'beta')
    """
    names: Names = ()
    parent: Place | None = None
    place: Place | None = ROOT
    for step in map(str, location):
        if place and step in place.kinds:
            place = Place(names, (Option(place.kinds[step]),), place.field)
        elif place and _is_branch(place, step):
            continue
        elif step != "[key]":
            names = (*names, step)
            parent, place = place, place.below(step) if place else None
    return names, parent, place


def _is_branch(place: Place, step: str) -> bool:
    """Tell whether a step of pydantic's is none of ours: it names one type out of several, tried in turn."""
    sections = [option.section.__name__ for option in place.options if option.section]
    if not any(option.section or option.entry or option.type is Any for option in place.options):
        return True  # nothing can stand below a number or a text
    return len(place.options) > 1 and (step in sections or step.startswith("literal["))


def fields(place: Place = ROOT) -> Iterator[Place]:
    """Yield the place of every field that takes a value rather than the fields of a section."""
    for name in place.keys:
        below = place.below(name)
        if below and any(option.section for option in below.options):
            yield from fields(below)
        elif below and below.field:
            yield below


def changes_kind(names: Names, base: Node, top: Node) -> bool:
    """Say whether a mapping names another kind than the one below it, so that their fields must not mix.

    Only unions of sections count: `heads.kind` is an ordinary field beside the others.
    """
    place = place_at(names)
    below, above = base.child("kind"), top.child("kind")
    if not (place and place.kinds and below and above):
        return False
    return bool(below.plain() != above.plain())
