"""What to do about a faulty value or name."""

from typing import Any, get_origin

from pydantic_core import PydanticUndefined

from mtp_lightning.recipe.schema.describe import one_of
from mtp_lightning.recipe.schema.field_types import Place
from mtp_lightning.recipe.tree import Names
from mtp_lightning.recipe.yaml import is_number, one_line_yaml

GIVE_FIELDS = "Give a mapping of its fields, or remove it."
LOOSE_BOOLEANS = ("yes", "no", "on", "off", "true", "false")


def suggest_fix(place: Place, value: Any) -> str:
    """Say what to do about a value of the wrong type or out of bounds.

    >>> from mtp_lightning.recipe.schema.field_types import place_at
    >>> suggest_fix(place_at(["model", "qkv_bias"]), "yes")
    'Write true, without quotes.'
    """
    types = [get_origin(option.type) or option.type for option in place.options]
    if isinstance(value, str):
        return _remedy_for_text(place, value, types)
    if bool in types and value in (0, 1):
        return f"Write {'true' if value else 'false'}."
    if list in types and isinstance(value, dict):
        return "Give the whole list, e.g. [a, b]."
    if list in types and not isinstance(value, list | dict) and value is not None:
        return f"Write a list: [{one_line_yaml(value)}]."
    if str in types and not isinstance(value, list | dict) and value is not None:
        return f'Put it in quotes: "{one_line_yaml(value)}".'
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


def remedy_for_unknown(names: Names, parent: Place | None, meant: str | None, *, is_override: bool) -> str:
    """Say what to do about a name that the schema does not have."""
    *sections, name = names
    if meant is None:
        keys = parent.keys if parent else ()
        return f"Remove it, or choose {one_of(keys)}." if keys else "Remove it."
    if is_override:
        return f"Write {meant if '.' in meant else '.'.join((*sections, meant))}=VALUE."
    section, _, last = meant.rpartition(".")
    if meant == name:
        return f"Write {last} beneath {section}, indented."
    return f"Write {last} in the section {section}." if section else f"Write {meant}."
