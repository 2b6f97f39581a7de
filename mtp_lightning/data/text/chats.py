"""Chats as rows of data say them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mtp_lightning.errors import DataError

FIELDS = ("messages", "tools", "documents", "chat_template_kwargs")


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A conversation as a row says it.

    Attributes:
        messages: objects with `role`, and `content` or `tool_calls`, as the template takes them.
        tools: descriptions of the functions that the model may call.
        variables: more that the template sees, such as `documents`.
        num_given: number of first turns that are read only, whoever speaks.
    """

    messages: list[Mapping[str, Any]]
    tools: list[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    num_given: int = 0


def chat_of_record(record: Mapping[str, Any], place: str) -> Chat | None:
    """Return the chat of a row: turns under `messages`, or under both `prompt` and `completion`; None without one.

    `tools` (a list, or its JSON), `documents` and `chat_template_kwargs` go to the template.

    Raises:
        DataError: It is not a list of objects with a role; the error names the place.
    """
    is_pair = isinstance(record.get("prompt"), list) and isinstance(record.get("completion"), list)
    if "messages" not in record and not is_pair:
        return None
    given, answer = (record["prompt"], record["completion"]) if is_pair else ([], record["messages"])
    messages = [*given, *(answer if isinstance(answer, list) else [answer])]
    for number, message in enumerate(messages):
        if not (isinstance(message, Mapping) and _says_something(message)):
            raise _wrong(place, f"message {number} is not an object with 'role' and 'content' (or 'tool_calls')")
    if not messages:
        raise _wrong(place, "no messages")
    tools = record.get("tools")
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError) as error:
        raise _wrong(place, f"'tools' is not JSON: {error}") from error
    if not isinstance(tools, list | None):
        raise _wrong(place, f"'tools' is a {type(tools).__name__}, not a list")
    more = record.get("chat_template_kwargs") or {}
    variables = {**(more if isinstance(more, Mapping) else {}), "documents": record.get("documents")}
    return Chat(messages=messages, tools=tools or None, variables=variables, num_given=len(given))


def _says_something(message: Mapping[str, Any]) -> bool:
    said = [name for name, value in message.items() if value is not None and name != "role"]
    return bool(said) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str | list | None)


def _wrong(place: str, found: str) -> DataError:
    return DataError(
        "a chat must be a list of turns under 'messages'", f"{place}: {found}", "Correct or remove the line"
    )
