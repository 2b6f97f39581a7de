"""Plain words for what a place in a recipe allows, for what was found there, and for what was probably meant."""

import json
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from itertools import islice
from math import isfinite
from typing import Any, get_origin

import annotated_types

from mtp_lightning.recipe.schema.base import LARGEST, LARGEST_INT, SMALLEST
from mtp_lightning.recipe.schema.field_types import Option, Place, fields, options_of
from mtp_lightning.recipe.yaml import one_line_yaml

LONGEST_VALUE = 100


def one_of(words: Sequence[str], conjunction: str = "or") -> str:
    """Join alternatives.

    >>> one_of(["a", "b", "c"])
    'a, b or c'
    """
    return f" {conjunction} ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)


def allowed(place: Place, value: Any = None) -> str:
    """Describe the values that may stand at a place; bounds that all numbers have are named where `value` breaks them.

    >>> from mtp_lightning.recipe.schema.field_types import place_at
    >>> allowed(place_at(["model", "num_key_value_heads"]))
    'a whole number >= 1 or null'
    """
    if place.kinds:
        return f"a mapping whose kind is {one_of(list(place.kinds))}"
    is_finite = isinstance(value, int) or (isinstance(value, float) and isfinite(value))
    is_extreme = is_finite and not (value <= 0 or SMALLEST <= value <= LARGEST_INT)
    return one_of([_allowed_by(option, is_extreme=is_extreme) for option in place.options])


def _allowed_by(option: Option, *, is_extreme: bool = False) -> str:
    if option.section:
        return "a mapping of fields"
    if words := option.choices or words_of_pattern(option):
        return one_of(words)
    if get_origin(option.type) is dict:
        keys = f"from {one_of(option.keys)}" if option.keys else "of names"
        return f"a mapping {keys} to {_entries(option)[1]}"
    if get_origin(option.type) is list:
        return f"a list of {_entries(option)[1]}{_length(option)}"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    return f"{names[option.type]}{_bounds(option, is_extreme=is_extreme)}"


def words_of_pattern(option: Option) -> list[str]:
    """List the words that a pattern such as `^(trunk|below_\\d+)$` stands for; empty where there is no pattern."""
    patterns = [limit.pattern for limit in option.limits if hasattr(limit, "pattern")]
    return patterns[0].strip("^()$").replace(r"\d+", "K").split("|") if patterns else []


def _entries(option: Option) -> tuple[str, str]:
    """Describe one entry and several entries of a list or mapping."""
    entry = options_of(option.entry)[0]
    if entry.type is Any:
        return "anything", "anything"
    if entry.section:
        return "a mapping of fields", "mappings of fields"
    if entry.choices:
        return one_of(entry.choices), f"words out of {one_of(entry.choices, 'and')}"
    if words := words_of_pattern(entry):
        return one_of(words), f"words out of {one_of(words, 'and')}"
    if get_origin(entry.type) is list:
        return _allowed_by(entry), f"lists of {_entries(entry)[1]}"
    plural = {int: "whole numbers", float: "numbers", str: "texts"}[entry.type]
    return _allowed_by(entry), f"{plural}{_bounds(entry)}"


def _bounds(option: Option, *, is_extreme: bool = False) -> str:
    hidden = () if is_extreme else (LARGEST_INT, LARGEST, SMALLEST, -LARGEST)
    signs = {annotated_types.Ge: ">=", annotated_types.Gt: ">", annotated_types.Le: "<=", annotated_types.Lt: "<"}
    bounds = [
        f"{sign} {value:,}" if isinstance(value, int) else f"{sign} {value:g}"
        for limit in option.limits
        for kind, sign in signs.items()
        if isinstance(limit, kind) and (value := getattr(limit, kind.__name__.lower())) not in hidden
    ]
    return f" {' and '.join(bounds)}" if bounds else ""


def _length(option: Option) -> str:
    shortest = next((limit.min_length for limit in option.limits if hasattr(limit, "min_length")), 0)
    longest = next((limit.max_length for limit in option.limits if hasattr(limit, "max_length")), None)
    if shortest == longest:
        return f" (exactly {shortest})"
    return f" (at least {shortest})" if shortest else ""


def found(value: Any) -> str:
    """Describe a value as it was read.

    >>> found("100"), found(1e-3), found(None), found({"kind": "decay"})
    ('the text "100"', 'the number 0.001', 'null', 'a mapping: {kind: decay}')
    """
    if value is None or isinstance(value, bool):
        return one_line_yaml(value)
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else one_line_yaml(_head(value))
    text = shortened(text)
    kinds = {str: "the text ", int: "the number ", float: "the number ", list: "a list: ", dict: "a mapping: "}
    return f"{kinds[type(value)]}{text}"


def shortened(text: str) -> str:
    """Cut a value that is too long to be shown."""
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _head(value: Any) -> Any:
    """Return as much of a nested value as is shown at most."""
    if isinstance(value, dict):
        return {key: _head(entry) for key, entry in islice(value.items(), LONGEST_VALUE)}
    return [_head(item) for item in value[:LONGEST_VALUE]] if isinstance(value, list) else value


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate that looks most like a name, if any does."""
    matches = get_close_matches(name.lower(), list(candidates), n=1, cutoff=0.6)
    return matches[0] if matches else None


def nearest_field(name: str, parent: Place | None) -> str | None:
    """Return the field that was probably meant by an unknown name: a sibling, else one of another section.

    The name of something in a section (`optimizer.name`) means no field: neither the recipe's own name nor another.

    >>> from mtp_lightning.recipe.schema.field_types import place_at
    >>> nearest_field("num_ofsets", place_at(["heads"])), nearest_field("num_offsets", place_at(["data"]))
    ('num_offsets', 'heads.num_offsets')
    """
    if name == "name":
        return None
    elsewhere = sorted((".".join(place.names) for place in fields()), key=lambda path: path.count("."))
    exact = [path for path in elsewhere if name in (path, path.rpartition(".")[2])]
    likely = nearest(name, parent.keys) if parent else None
    if exact or likely:
        return exact[0] if exact else likely
    last_names = [path.rpartition(".")[2] for path in elsewhere]
    likely = nearest(name, last_names)
    return elsewhere[last_names.index(likely)] if likely else None


def is_last_name(name: str) -> bool:
    """Tell whether a name is that of a field in some section.

    >>> is_last_name("num_offsets"), is_last_name("num_ofsets")
    (True, False)
    """
    return any(place.names[-1] == name for place in fields())
