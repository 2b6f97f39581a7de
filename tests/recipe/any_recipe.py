"""Recipes of any values that the schema allows, for property tests."""

from typing import Any, get_origin

import annotated_types
from hypothesis import strategies as st

from mtp_lightning.recipe.schema.base import Section
from mtp_lightning.recipe.schema.field_types import Option, options_of
from mtp_lightning.recipe.schema.root import Recipe


def recipes() -> st.SearchStrategy[Recipe]:
    """Recipes whose fields are valid one by one; the rules between fields are not heeded."""
    return _values(Option(Recipe)).map(Recipe.model_validate)


def _values(option: Option) -> st.SearchStrategy[Any]:
    if option.section:
        return _sections(option.section)
    if option.choices:
        return st.sampled_from(option.choices)
    if get_origin(option.type) is list:
        longest = next((limit.max_length for limit in option.limits if isinstance(limit, annotated_types.MaxLen)), 3)
        return st.lists(_any_of(option.entry), min_size=_shortest(option), max_size=longest)
    if get_origin(option.type) is dict:
        return st.dictionaries(st.sampled_from(option.keys) if option.keys else st.text(), _any_of(option.entry))
    if option.type is Any:
        return st.recursive(st.none() | st.booleans() | st.integers() | st.text(), _nested, max_leaves=4)
    return _scalars(option)


def _shortest(option: Option) -> int:
    return next((limit.min_length for limit in option.limits if isinstance(limit, annotated_types.MinLen)), 0)


def _nested(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(values, max_size=3) | st.dictionaries(st.text(), values, max_size=3)


def _sections(section: type[Section]) -> st.SearchStrategy[dict[str, Any]]:
    fields = {name: _any_of(field.annotation, field.metadata) for name, field in section.model_fields.items()}
    return st.fixed_dictionaries(fields)


def _any_of(annotation: Any, limits: Any = ()) -> st.SearchStrategy[Any]:
    return st.one_of([_values(option) for option in options_of(annotation, limits)])


def _scalars(option: Option) -> st.SearchStrategy[Any]:
    low = next((limit.ge for limit in option.limits if isinstance(limit, annotated_types.Ge)), None)
    above = next((limit.gt for limit in option.limits if isinstance(limit, annotated_types.Gt) and low is None), None)
    high = next((limit.le for limit in option.limits if isinstance(limit, annotated_types.Le)), None)
    below = next((limit.lt for limit in option.limits if isinstance(limit, annotated_types.Lt)), None)
    if option.type is float:
        return st.floats(
            min_value=low if above is None else above,
            max_value=high if below is None else below,
            exclude_min=above is not None,
            exclude_max=below is not None,
            allow_nan=False,
            allow_infinity=False,
        )
    if patterns := [limit.pattern for limit in option.limits if hasattr(limit, "pattern")]:
        return st.from_regex(patterns[0].replace(r"\d", "[0-9]").rstrip("$"), fullmatch=True)
    return {
        int: st.integers(min_value=low, max_value=high),
        str: st.text(min_size=_shortest(option)),
        bool: st.booleans(),
        type(None): st.none(),
    }[option.type]
