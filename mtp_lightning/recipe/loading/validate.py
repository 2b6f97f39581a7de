"""A tree of values to a recipe; every fault of names, types and bounds is put into plain words."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from mtp_lightning.errors import Fault
from mtp_lightning.recipe.schema.describe import (
    allowed,
    found,
    is_last_name,
    nearest,
    nearest_field,
    one_of,
    words_of_pattern,
)
from mtp_lightning.recipe.schema.field_types import ROOT, Place, follow, place_at
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.recipe.synonyms import RENAMED, Synonym, synonym_of
from mtp_lightning.recipe.tree import COMMAND_LINE, Names, Node
from mtp_lightning.recipe.yaml import is_number, one_line_yaml

MAX_ROUNDS = 1000
MOST_FAULTS = 200
GIVE_FIELDS = "Give a mapping of its fields, or remove it."
LOOSE_BOOLEANS = ("yes", "no", "on", "off", "true", "false")


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
            seen: set[Names] = set()
            for detail in sorted(error.errors(include_url=False), key=_is_missing):
                names, _, place = follow(detail["loc"])
                if names in seen or _is_other_branch(detail, place):
                    continue
                seen.add(names)
                is_renamed = _is_missing(detail) and ".".join(names) in suspects  # given, under another name
                found_here = [] if is_renamed or len(faults) >= MOST_FAULTS else _faults_from(detail, tree)
                faults += found_here
                suspects.update(*(_suspects(names, fault.nearest) for fault in found_here))
                _set_aside(values, names[:-1] if _is_missing(detail) else names)
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


def _is_missing(detail: ErrorDetails) -> bool:
    """Tell whether a section lacks a field that has no default; the section as a whole is then set aside."""
    return detail["type"] == "missing"


def _is_other_branch(detail: ErrorDetails, place: Place | None) -> bool:
    """Tell whether a mapping is refused as a word only, where a section may stand too, whose faults tell more."""
    has_section = place is not None and any(option.section for option in place.options)
    return has_section and detail["type"] == "literal_error" and isinstance(detail["input"], dict)


def _set_aside(values: dict[str, Any], names: Names) -> None:
    """Remove an entry, so that its default is taken; an item of a list, or what is not there, goes with the whole."""
    for above, name in pairwise(names):
        below = values.get(above)
        if not isinstance(below, dict) or name not in below:
            values.pop(above, None)
            return
        values = below
    values.pop(names[-1], None)


def _suspects(names: Names, meant: str | None) -> set[str]:
    """Name the fields that a fault leaves in doubt: the one that was written and the one that was meant."""
    return {".".join(names)} | ({meant, ".".join((*names[:-1], meant))} if meant else set())


def _faults_from(detail: ErrorDetails, tree: Node) -> list[Fault]:
    """Put one error of pydantic's into plain words; it only says where, the schema says what must hold."""
    names, parent, place = follow(detail["loc"])
    origin = tree.origin_at(names) or "default"
    if place is None or detail["loc"][-1] == "[key]":
        return unknown_names(names, parent, tree)
    if detail["type"].startswith("union_tag"):
        return [_unknown_kind(names, place, detail["input"], tree)]
    if _is_missing(detail):
        return [_missing(names, place, tree)]
    value, node = detail["input"], tree.at(names)
    choices = [choice for option in place.options for choice in option.choices or words_of_pattern(option)]
    meant = nearest(value, choices) if isinstance(value, str) else None
    wanted = allowed(place, value)
    if detail["type"] == "finite_number":
        wanted = wanted.replace("a number", "a finite number")
    fault = Fault(
        path=".".join(names),
        expected=f"must be {wanted}",
        found=found(value),
        origin=origin,
        nearest=meant,
        hint=f"Write {meant}." if meant else suggest_fix(place, value, node.text if node else ""),
    )
    return [fault]


def _missing(names: Names, place: Place, tree: Node) -> Fault:
    section = ".".join(names[:-1])
    return Fault(
        path=".".join(names),
        expected=f"must be given, {allowed(place)}: it has no default",
        found=f"{section} without it",
        origin=tree.origin_at(names[:-1]) or "default",
        hint=f"Give {names[-1]} in {section}, or remove {section}.",
    )


def unknown_names(names: Names, parent: Place | None, tree: Node) -> list[Fault]:
    """Report a name that the schema does not have; of a section of other frameworks, each field in it."""
    node = tree.at(names)
    is_ours = ".".join(names[-2:]) in RENAMED or names[-1] in ROOT.keys
    is_misspelt = parent and nearest(names[-1], parent.keys)
    if node and isinstance(node.value, dict) and not is_ours:
        fields_below = list(_fields_below(node, names))
        is_known = any(_synonym(path, tree.at(path)) for path in fields_below)
        if is_known or (not is_misspelt and any(is_last_name(path[-1]) for path in fields_below)):
            return [_unknown_name(path, None, tree) for path in fields_below]
    return [_unknown_name(names, parent, tree)]


def unknown_names_below(names: Names, place: Place, tree: Node) -> list[Fault]:
    """Report what is written at a path under names that a place of the schema does not have."""
    node = tree.at(names)
    faults: list[Fault] = []
    for name in node.value if node and isinstance(node.value, dict) and place.keys else ():
        path, below = (*names, name), place.below(name)
        faults += unknown_names_below(path, below, tree) if below else unknown_names(path, place, tree)
    return faults


def _fields_below(node: Node, names: Names) -> Iterator[Names]:
    for name, entry in node.value.items():
        if isinstance(entry.value, dict) and entry.value:
            yield from _fields_below(entry, (*names, name))
        else:
            yield (*names, name)


def _unknown_name(names: Names, parent: Place | None, tree: Node) -> Fault:
    node, whole = tree.at(names), place_at(names[:-1])
    section, name = ".".join(names[:-1]) if whole else "", names[-1]
    origin = node.origin if node else "default"
    owners = [kind for kind, section in whole.kinds.items() if name in section.model_fields] if whole else []
    known = None if owners else _synonym(names, node)
    meant = known.field if known else None if owners else nearest_field(name, parent)
    hint = remedy_for_unknown(names, parent, known or meant, is_override=origin == COMMAND_LINE)
    return Fault(
        path=".".join(names),
        expected=f"must be a field of {f'the kind that {section} has' if owners else section or 'the recipe'}",
        found=f"a field of the kind {one_of(owners)}" if owners else f"the unknown name {name}",
        origin=origin,
        nearest=meant,
        hint=f"Set {section}.kind to {one_of(owners)}, or remove {name}." if owners else hint,
    )


def _synonym(names: Names, node: Node | None) -> Synonym | None:
    """Return what a foreign name means, unless a field of ours has this name."""
    known = synonym_of(names, node.plain() if node else None)
    return None if known and is_last_name(known.spelling) else known


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


def suggest_fix(place: Place, value: Any, text: str = "") -> str:
    """Say what to do about a value of the wrong type or out of bounds; `text` is how it was written.

    >>> from mtp_lightning.recipe.schema.field_types import place_at
    >>> suggest_fix(place_at(["model", "qkv_bias"]), "yes")
    'Write true, without quotes.'
    """
    types = [get_origin(option.type) or option.type for option in place.options if not option.choices]
    if isinstance(value, str):
        return _remedy_for_text(place, value, types)
    if bool in types and value in (0, 1):
        return f"Write {'true' if value else 'false'}."
    if dict in types and isinstance(value, list):
        return "Write names with a colon in place of the dashes, e.g. {a: …, b: …}."
    if list in types and isinstance(value, dict):
        return "Give the whole list, e.g. [a, b]."
    if list in types and not isinstance(value, list | dict) and value is not None:
        return f"Write a list: [{one_line_yaml(value)}]."
    if str in types and int not in types and not isinstance(value, list | dict) and value is not None:
        return f'Put it in quotes: "{text or one_line_yaml(value)}".'
    if any(option.section for option in place.options):
        return "Indent its fields beneath it, or remove it." if value is None else GIVE_FIELDS
    return _default_remedy(place)


def _remedy_for_text(place: Place, value: str, types: list[Any]) -> str:
    if bool in types and value.lower() in LOOSE_BOOLEANS:
        return f"Write {'true' if value.lower() in ('yes', 'on', 'true') else 'false'}, without quotes."
    if is_number(value) and (int in types or float in types):
        return f"Write {value} without quotes."
    if list in types:
        return f"Write a list: [{value}]."
    if any(option.section for option in place.options):
        return GIVE_FIELDS
    return _default_remedy(place)


def _default_remedy(place: Place) -> str:
    default = place.field.default if place.field else PydanticUndefined
    if default is PydanticUndefined:
        return "Change it, or remove it."
    return f"Change it, or remove it (default: {one_line_yaml(default)})."


def remedy_for_unknown(names: Names, parent: Place | None, meant: Synonym | str | None, *, is_override: bool) -> str:
    """Say what to do about a name that the schema does not have."""
    *sections, name = names
    if isinstance(meant, Synonym):
        return _remedy_for_synonym(sections, meant, is_override=is_override)
    if meant is None:
        keys = parent.keys if parent else ()
        return f"Remove it, or choose {one_of(keys)}." if keys else "Remove it."
    is_sibling = parent is not None and meant in parent.keys
    if is_override:
        return f"Write {'.'.join((*sections, meant)) if is_sibling else meant}=VALUE."
    section, _, last = meant.rpartition(".")
    if meant == name and section:
        return f"Write {last} beneath {section}, indented."
    if section:
        return f"Write {last} in the section {section}."
    return f"Write {meant}." if is_sibling else f"Write {meant} at the top level, outside of {'.'.join(sections)}."


def _remedy_for_synonym(sections: list[str], meant: Synonym, *, is_override: bool) -> str:
    """Say where to write our field, and how the value translates."""
    section, _, last = meant.field.rpartition(".")
    value = None if meant.value is None else one_line_yaml(meant.value)
    note = f" ({meant.note})" if meant.note else ""
    if is_override:
        argument = f"{meant.field}={value or 'VALUE'}"
        return f'Write "{argument}"{note}.' if " " in argument else f"Write {argument}{note}."
    where = f" in the section {section}" if section else " at the top level"
    is_here = section == ".".join(sections)
    return f"Write {last}{f': {value}' if value else ''}{'' if is_here else where}{note}."
