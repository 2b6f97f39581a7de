"""Types of the fields that hold paths: `~` and variables of the environment are expanded when a recipe is read."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator

from mtp_lightning.files.paths import expanded

Value = TypeVar("Value")


@dataclass(frozen=True)
class IsPath:
    """Marks a field of paths: on this machine, or URLs as well."""

    may_be_url: bool = False


def with_expanded_names(values: dict[str, Value]) -> dict[str, Value]:
    """Expand the keys of a mapping, unless two of them are then the same."""
    named = {expanded(name): value for name, value in values.items()}
    return named if len(named) == len(values) else values


def with_expanded_texts(value: Any) -> Any:
    """Expand every text and key in plain values: for parts of a recipe that are checked later."""
    if isinstance(value, dict):
        return with_expanded_names({name: with_expanded_texts(entry) for name, entry in value.items()})
    if isinstance(value, list):
        return [with_expanded_texts(item) for item in value]
    return expanded(value) if isinstance(value, str) else value


def texts_of(value: Any) -> Iterator[str]:
    """Yield the paths in a field: a text, the items of a list, or the keys of a mapping; a number is none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        yield from value


LocalPath = Annotated[str, AfterValidator(expanded), IsPath()]
PathOrUrl = Annotated[str, AfterValidator(expanded), IsPath(may_be_url=True)]
EXPANDED_NAMES = (AfterValidator(with_expanded_names), IsPath(may_be_url=True))
"""Of a mapping whose keys are paths or URLs."""
