"""Raw DeepSpeed keys of a recipe, held against a table of those that DeepSpeed reads: checked without DeepSpeed.

`deepspeed_keys.json` is written from the installed DeepSpeed, and a test says when it is no longer the same.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from mtp_lightning.errors import Fault
from mtp_lightning.recipe.rules.strategy import RESERVED_DEEPSPEED_KEYS
from mtp_lightning.recipe.schema.describe import found, nearest, one_of
from mtp_lightning.recipe.schema.root import Recipe

FIELD = "strategy.deepspeed"
OWN = ""  # in the table, what a section may be itself
AUTO = "auto"  # leaves any key to DeepSpeed
WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "text": "text",
    "mapping": "a mapping of keys",
    "list": "a list",
}
TYPES: Mapping[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
    "text": (str,),
    "mapping": (dict,),
    "list": (list,),
    "null": (type(None),),
}


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(files("mtp_lightning.recipe.rules").joinpath("deepspeed_keys.json").read_text())
    return table


def check_deepspeed(recipe: Recipe, origins: Mapping[str, str]) -> list[Fault]:
    """Return a fault for each raw key that DeepSpeed does not know, or that it would not take the value of.

    >>> recipe = Recipe.model_validate({"strategy": {"deepspeed": {"zero_optimization": {"reduce_buckt_size": 5}}}})
    >>> [fault.nearest for fault in check_deepspeed(recipe, {})]
    ['reduce_bucket_size']
    """
    raw = recipe.strategy.deepspeed
    return list(_faults(raw, _table(), (), origins.get(FIELD, "default"))) if raw else []


def _faults(raw: Mapping[str, Any], keys: Mapping[str, Any], above: tuple[str, ...], origin: str) -> Iterator[Fault]:
    for name, value in raw.items():
        path, known = (*above, name), keys.get(name)
        if ".".join(path) in RESERVED_DEEPSPEED_KEYS:
            continue  # a fault of its own
        if known is None:
            yield _unknown(path, keys, origin)
            continue
        wanted = known.get(OWN, "mapping") if isinstance(known, dict) else known
        if not _is_allowed(value, wanted):
            yield _wrong(path, value, wanted, origin)
        elif isinstance(known, dict) and isinstance(value, dict):
            yield from _faults(value, known, path, origin)


def _is_allowed(value: Any, wanted: str) -> bool:
    kinds, _, least = wanted.partition(" >= ")
    names = kinds.split(" | ")
    if "any" in names or value == AUTO or (isinstance(value, str) and value in names):
        return True
    if isinstance(value, float) and value.is_integer() and "int" in names:
        value = int(value)
    is_of_type = any(isinstance(value, TYPES.get(name, ())) for name in names)
    if isinstance(value, bool) and "bool" not in names:
        return False
    return is_of_type and not (least and isinstance(value, int | float) and value < float(least))


def _wrong(path: tuple[str, ...], value: Any, wanted: str, origin: str) -> Fault:
    kinds, at_least, least = wanted.partition(" >= ")
    words = one_of([WORDS.get(kind, kind) for kind in kinds.split(" | ")])
    return Fault(
        path=".".join((FIELD, *path)),
        expected=f"must be {words}{at_least}{least}, as DeepSpeed has it",
        found=found(value),
        origin=origin,
        hint="Change it, or remove it.",
    )


def _unknown(path: tuple[str, ...], keys: Mapping[str, Any], origin: str) -> Fault:
    """Report a key that DeepSpeed would pass over in silence, or refuse."""
    *above, name = path
    meant = (
        None if name == OWN else next(iter(_sections_with(name)), None) or nearest(name, [key for key in keys if key])
    )
    hint = "Remove it: DeepSpeed does not read it."
    if meant:
        hint = f"Write {name} beneath {meant.rpartition('.')[0]}." if "." in meant else f"Write {meant}."
    return Fault(
        path=".".join((FIELD, *path)),
        expected=f"must be a key of {f'{above[-1]} of DeepSpeed' if above else 'DeepSpeed'}",
        found=f"the unknown name {name}",
        origin=origin,
        nearest=meant,
        hint=hint,
    )


def _sections_with(name: str) -> list[str]:
    """List the paths of keys of this name beneath the sections of the top level."""
    return [f"{section}.{name}" for section, keys in _table().items() if isinstance(keys, dict) and name in keys]
