"""Chats as rows of data say them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation as a row says it.

    Attributes:
        messages: objects with `role`, and `content` or `tool_calls`, as the template takes them.
        tools: descriptions of the functions that the model may call.
        variables: more that the template sees, such as `documents`.
        num_given: number of first turns that are read only, whoever speaks.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: list[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    num_given: int = 0
