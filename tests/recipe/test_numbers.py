"""Scalars as YAML 1.2 writes them, and dates and stray underscores as text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_lightning.recipe.loading.parse import read_overrides
from mtp_lightning.recipe.yaml import one_line_yaml


def read(text: str) -> object:
    """Read a value as an override does."""
    faults: list[object] = []
    value = read_overrides([f"value={text}"], faults).plain()["value"]
    assert faults == []
    return value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1.0e3", 1000.0),
        ("1e-3", 1e-3),
        ("1e6", 1e6),
        ("1E+6", 1e6),
        ("-2.5e-3", -2.5e-3),
        (".5", 0.5),
        ("5.", 5.0),
        ("1_000.5", 1000.5),
        ("1_000_000", 1_000_000),
        ("-7", -7),
        ("007", 7),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("'3e-4'", "3e-4"),
        ("!!str 3", "3"),
        ("yes", "yes"),
        ("no", "no"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("1_", "1_"),
        ("1__0", "1__0"),
        ("e3", "e3"),
        ("3e", "3e"),
        ("runs/x", "runs/x"),
        ("stdlib:json", "stdlib:json"),
        ("[a, 1e-3]", ["a", 1e-3]),
        ("{heads: 4}", {"heads": 4}),
    ],
)
def test_scalar_is_read_as_yaml_1_2_has_it(text: str, value: object) -> None:
    found = read(text)
    assert (type(found), found) == (type(value), value)


@given(st.one_of(st.floats(allow_nan=False), st.integers(), st.booleans(), st.none(), st.text()))
def test_scalar_reads_back_as_it_was(value: object) -> None:
    found = read(one_line_yaml(value))
    assert (type(found), found) == (type(value), value)


@given(st.lists(st.one_of(st.text(), st.floats(allow_nan=False)), max_size=4))
def test_list_reads_back_as_it_was(values: list[object]) -> None:
    assert read(one_line_yaml(values)) == values
