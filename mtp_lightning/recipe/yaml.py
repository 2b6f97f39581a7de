"""YAML with the scalars of version 1.2, in and out.

PyYAML follows YAML 1.1, where 3e-4 is text, `no` is false, 010 is 8, 1:30 is 90 and 2026-01-01 is a date.
"""

import re
from collections.abc import Callable
from typing import Any

import yaml

NULL, TRUTH, WHOLE, REAL, TEXT = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str"))
Resolvers = dict[str, list[tuple[str, re.Pattern[str]]]]


def _resolvers() -> Resolvers:
    """Tell scalars apart by their text: first character -> (tag, pattern) in the order of trial."""
    digits = r"[0-9]+(?:_[0-9]+)*"
    fraction = rf"(?:\.{digits}|{digits}(?:\.(?:{digits})?)?)(?:[eE][-+]?[0-9]+)?"
    kinds = (
        (NULL, r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        (TRUTH, r"true|True|TRUE|false|False|FALSE", ["t", "T", "f", "F"]),
        (WHOLE, rf"[-+]?{digits}|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
        (REAL, rf"[-+]?(?:{fraction}|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)", [*"-+.0123456789"]),
    )
    table: Resolvers = {}
    for tag, pattern, first_characters in kinds:
        for character in first_characters:
            table.setdefault(character, []).append((tag, re.compile(rf"(?:{pattern})\Z")))
    return table


class RecipeYamlLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with the scalars of YAML 1.2 and underscores in numbers."""

    yaml_implicit_resolvers = _resolvers()


class RecipeYamlDumper(yaml.SafeDumper):
    """The writer that quotes exactly the text which `RecipeYamlLoader` would take for something else."""

    yaml_implicit_resolvers = RecipeYamlLoader.yaml_implicit_resolvers

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value out instead of pointing to an earlier one."""
        return True

    def represent_float(self, data: float) -> yaml.ScalarNode:
        """Write a float so that it reads back as the same float."""
        text = {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(repr(data), repr(data))
        return self.represent_scalar(REAL, text)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Write text on one line: in double quotes, with escapes, where a character would break the line."""
        style = None if data.isprintable() else '"'
        return self.represent_scalar(TEXT, data, style=style)


RecipeYamlDumper.add_representer(float, RecipeYamlDumper.represent_float)
RecipeYamlDumper.add_representer(str, RecipeYamlDumper.represent_str)


def implicit_tag(text: str) -> str:
    """Return the tag of a scalar that is written without quotes and without a tag.

    >>> [implicit_tag(text).rpartition(":")[2] for text in ("3e-4", "1_000_000", "no", "1:30", "2026-01-01", "~")]
    ['float', 'int', 'str', 'str', 'str', 'null']
    """
    rules = RecipeYamlLoader.yaml_implicit_resolvers.get(text[:1], [])
    return next((tag for tag, pattern in rules if pattern.match(text)), TEXT)


def is_number(text: str) -> bool:
    """Say whether a scalar written without quotes is a number."""
    return implicit_tag(text) in (WHOLE, REAL)


def scalar_value(tag: str, text: str) -> Any:
    """Turn a scalar into its value; raise KeyError if the tag is foreign or does not fit the text.

    >>> scalar_value(REAL, "1_000.5"), scalar_value(WHOLE, "0x1F"), scalar_value(TEXT, "5")
    (1000.5, 31, '5')
    """
    digits = text.replace("_", "").lower()
    readers: dict[str, Callable[[], Any]] = {
        NULL: lambda: None,
        TRUTH: lambda: digits == "true",
        WHOLE: lambda: int(digits, 0 if digits[:2] in ("0x", "0o") else 10),
        REAL: lambda: float(digits.replace(".inf", "inf").replace(".nan", "nan")),
        TEXT: lambda: text,
    }
    return readers[tag if tag in (TEXT, implicit_tag(text)) else "a tag that does not fit"]()


def one_line_yaml(value: Any) -> str:
    """Write a plain value as one line of YAML.

    >>> one_line_yaml({"kind": "decay", "values": [1.0, 3e-4], "note": "1e3"})
    "{kind: decay, values: [1.0, 0.0003], note: '1e3'}"
    """
    text = yaml.dump(
        value,
        Dumper=RecipeYamlDumper,
        default_flow_style=True,
        sort_keys=False,
        allow_unicode=True,
        width=float("inf"),
    )
    return text.removesuffix("\n").removesuffix("\n...")
