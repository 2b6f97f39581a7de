"""A tree of values to a recipe; every fault of names, types and bounds is put into plain words."""

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mtp_lightning.errors import Fault
from mtp_lightning.recipe.loading.overrides import COMMAND_LINE
from mtp_lightning.recipe.loading.remedies import remedy_for_unknown, suggest_fix
from mtp_lightning.recipe.schema.describe import allowed, found, nearest, nearest_field, one_of
from mtp_lightning.recipe.schema.field_types import ROOT, Place, follow, place_at
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.tree import Names, Node

MAX_ROUNDS = 1000


@dataclass(frozen=True)
class Checked:
    """A recipe and its faults; the fields named in `suspects` hold defaults instead of what was written."""

    recipe: Recipe
    faults: list[Fault]
    suspects: frozenset[str]


def check_fields(tree: Node) -> Checked:
    """Check names, types and bounds; faulty values are set aside, so that the rest can still be checked."""
    values = with_whole_numbers(tree.plain(), ROOT)
    faults: list[Fault] = []
    suspects: set[str] = set()
    for _ in range(MAX_ROUNDS):
        try:
            return Checked(Recipe.model_validate(values), faults, frozenset(suspects))
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                names = follow(detail["loc"])[0]
                faults.append(_fault_from(detail, tree))
                suspects.update(_suspects(names, faults[-1].nearest))
                _set_aside(values, names)
    raise AssertionError("each round sets a value aside")


def with_whole_numbers(value: Any, place: Place | None) -> Any:
    """Return the values with whole numbers that were written as floats, such as 1e6, turned into integers.

    >>> with_whole_numbers({"model": {"hidden_size": 1e3, "initializer_range": 1.0}}, ROOT)
    {'model': {'hidden_size': 1000, 'initializer_range': 1.0}}
    """
    if place and isinstance(value, dict):
        return {name: with_whole_numbers(entry, place.below(name)) for name, entry in value.items()}
    if place and isinstance(value, list):
        return [with_whole_numbers(item, place.below(str(index))) for index, item in enumerate(value)]
    types = [option.type for option in place.options] if place else []
    is_whole = isinstance(value, float) and value.is_integer() and int in types and float not in types
    return int(value) if is_whole else value


def _set_aside(values: dict[str, Any], names: Names) -> None:
    """Remove an entry, so that its default is taken; an item of a list goes with the whole list."""
    for name in names[:-1]:
        if not isinstance(values.get(name), dict):
            values.pop(name, None)
            return
        values = values[name]
    values.pop(names[-1], None)


def _suspects(names: Names, meant: str | None) -> set[str]:
    """Name the fields that a fault leaves in doubt: the one that was written and the one that was meant."""
    return {".".join(names)} | ({meant, ".".join((*names[:-1], meant))} if meant else set())


def _fault_from(detail: ErrorDetails, tree: Node) -> Fault:
    """Put one error of pydantic's into plain words; it only says where, the schema says what must hold."""
    names, parent, place = follow(detail["loc"])
    origin = tree.origin_at(names) or "default"
    if place is None or detail["loc"][-1] == "[key]":
        return _unknown_name(names, parent, origin)
    if detail["type"].startswith("union_tag"):
        return _unknown_kind(names, place, detail["input"], tree)
    value = detail["input"]
    choices = [choice for option in place.options for choice in option.choices]
    meant = nearest(value, choices) if isinstance(value, str) else None
    wanted = allowed(place)
    if detail["type"] == "finite_number":
        wanted = wanted.replace("a number", "a finite number")
    return Fault(
        path=".".join(names),
        expected=f"must be {wanted}",
        found=found(value),
        origin=origin,
        nearest=meant,
        hint=f"Write {meant}." if meant else suggest_fix(place, value),
    )


def _unknown_name(names: Names, parent: Place | None, origin: str) -> Fault:
    section, name = ".".join(names[:-1]), names[-1]
    whole = place_at(names[:-1])
    owners = [kind for kind, section in whole.kinds.items() if name in section.model_fields] if whole else []
    meant = None if owners else nearest_field(name, parent)
    hint = remedy_for_unknown(names, parent, meant, is_override=origin == COMMAND_LINE)
    return Fault(
        path=".".join(names),
        expected=f"must be a field of {f'the kind that {section} has' if owners else section or 'the recipe'}",
        found=f"a field of the kind {one_of(owners)}" if owners else f"the unknown name {name}",
        origin=origin,
        nearest=meant,
        hint=f"Set {section}.kind to {one_of(owners)}, or remove {name}." if owners else hint,
    )


def _unknown_kind(names: Names, place: Place, value: dict[str, Any], tree: Node) -> Fault:
    kinds = list(place.kinds)
    given = value.get("kind")
    meant = nearest(given, kinds) if isinstance(given, str) else None
    return Fault(
        path=".".join((*names, "kind")),
        expected=f"must be {one_of(kinds)}",
        found=found(given) if "kind" in value else f"no kind in {found(value)}",
        origin=tree.origin_at((*names, "kind")) or tree.origin_at(names) or "default",
        nearest=meant,
        hint=f"Write {meant}." if meant else f"Give a kind, e.g. {'.'.join(names)}.kind={kinds[0]}.",
    )
