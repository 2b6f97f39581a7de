"""YAML 1.2 in and out, by ruamel.yaml; dates, and numbers with stray underscores, stay text."""

import functools
import io
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import Node, ScalarNode
from ruamel.yaml.representer import SafeRepresenter

TAG_PREFIX = "tag:yaml.org,2002:"
NULL, TRUTH, WHOLE, REAL, TEXT = (f"{TAG_PREFIX}{kind}" for kind in ("null", "bool", "int", "float", "str"))
MOST_DEPTH = 100
_STRAY = re.compile(r"_(?![0-9a-fA-F])|0b")
_SAFE = YAML(typ="safe", pure=True)
_CONSTRUCT = {
    NULL: _SAFE.constructor.construct_yaml_null,
    TRUTH: _SAFE.constructor.construct_yaml_bool,
    WHOLE: _SAFE.constructor.construct_yaml_int,
    REAL: _SAFE.constructor.construct_yaml_float,
}


class _Representer(SafeRepresenter):
    """Writes every value out, and each text on one line."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value out instead of pointing to an earlier one."""
        return True

    def represent_str(self, data: str) -> ScalarNode:
        """Write text in double quotes, with escapes, where a character would break the line or begin a key.

        Within braces ruamel.yaml 0.19 reads a plain `?x` back as the key `x`.
        """
        is_plain = data.isprintable() and not data.startswith(("?", ":"))
        return self.represent_scalar(TEXT, data, style=None if is_plain else '"')


_Representer.add_representer(str, _Representer.represent_str)


def compose(text: str) -> Node | None:
    """Parse a document into nodes, each of which knows its line; raise one of ruamel.yaml's errors."""
    yaml = YAML(typ="safe", pure=True)
    yaml.max_depth = MOST_DEPTH
    root: Node | None = yaml.compose(text)
    return root


def implicit_tag(text: str) -> str:
    """Return the tag of a scalar that is written without quotes and without a tag.

    >>> [implicit_tag(text).rpartition(":")[2] for text in ("3e-4", "1_000_000", "no", "1:30", "2026-01-01", "~")]
    ['float', 'int', 'str', 'str', 'str', 'null']
    """
    tag = _resolved(text)
    return tag if tag in _CONSTRUCT and not _STRAY.search(text) else TEXT


def _resolved(text: str) -> str:
    return str(_SAFE.resolver.resolve(ScalarNode, text, (True, False)))


def is_number(text: str) -> bool:
    """Say whether a scalar written without quotes is a number."""
    return implicit_tag(text) in (WHOLE, REAL)


def scalar_value(node: ScalarNode) -> Any:
    """Turn a scalar into its value; raise KeyError if its tag is foreign or does not fit the text.

    >>> [scalar_value(compose(text)) for text in ("1_000.5", "0x1F", "'5'", "2026-01-01")]
    [1000.5, 31, '5', '2026-01-01']
    """
    tag = implicit_tag(node.value)
    if node.tag == TEXT or (tag == TEXT and node.tag == _resolved(node.value)):
        return node.value
    return _CONSTRUCT[tag if tag == node.tag else "a tag that does not fit"](node)


def one_line_yaml(value: Any) -> str:
    """Write a plain value as one line of YAML.

    >>> one_line_yaml({"kind": "decay", "values": [1.0, 3e-4], "note": "1e3"})
    "{kind: decay, values: [1.0, 0.0003], note: '1e3'}"
    """
    if value is None or type(value) in (bool, int):  # most fields, without the tenth of a second that all of them take
        return "null" if value is None else str(value).lower()
    if type(value) in (str, float):
        return _scalar_line(str(value), is_real=type(value) is float)
    return _dumped(value)


@functools.lru_cache(maxsize=4096)
def _scalar_line(text: str, *, is_real: bool) -> str:
    """Write a scalar; as text, since 0.0 equals -0.0. A recipe's values are written again and again."""
    return _dumped(float(text) if is_real else text)


def _dumped(value: Any) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    yaml.default_flow_style = True
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # declared as None
    yaml.width = 2**31
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue().removesuffix("\n").removesuffix("\n...")
