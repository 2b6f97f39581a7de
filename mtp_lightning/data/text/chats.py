"""Chats: turns that a template makes one text of, and which parts of it are learnt."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from mtp_lightning.data.tokenizers.chat import ChatTemplate, Span
from mtp_lightning.errors import DataError

LEARNT_ROLE = "assistant"
FIELDS = ("messages", "tools", "documents", "chat_template_kwargs")
Parts = tuple[tuple[bytes, bool], ...]
"""Texts in their order, and whether each is learnt or only read."""


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


@dataclass(frozen=True, kw_only=True)
class RenderedChat:
    """A chat as text.

    Attributes:
        parts: the text, cut where what is learnt begins and ends.
        num_turns: turns of the assistant that were to be learnt.
        num_unlearnt: those of which the template does not tell where they begin and end; they are only read.
    """

    parts: Parts
    num_turns: int
    num_unlearnt: int


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


def render_chat(chat: Chat, template: ChatTemplate) -> RenderedChat:
    """Render a chat and tell which characters are learnt.

    What a template marks with `{% generation %}` is learnt. Of a template without such marks, a turn of the assistant
    is what its rendering adds to the prompt from which the model would answer: found by rendering the chat up to the
    turn, with and without it. Where a template writes a turn in another way once more follow, it is only read.

    Raises:
        DataError: The template does not take the chat.
    """
    text, spans = template.render_marked(chat.messages, chat.tools, **chat.variables)
    wanted = [n for n, turn in enumerate(chat.messages) if n >= chat.num_given and turn["role"] == LEARNT_ROLE]
    num_unlearnt = 0
    if not template.marks_learnt:
        found = [_span_of(chat, number, text, template) for number in wanted]
        spans = [span for span in found if span]
        num_unlearnt = len(found) - len(spans)
    elif chat.num_given:
        prompt = _prefix(chat, chat.num_given, template, add_generation_prompt=True) or ""
        spans = [(max(begin, len(prompt)), end) for begin, end in spans if end > len(prompt)]
    return RenderedChat(parts=_cut(text, spans), num_turns=len(wanted), num_unlearnt=num_unlearnt)


def _span_of(chat: Chat, number: int, text: str, template: ChatTemplate) -> Span | None:
    """Return where one turn of the assistant stands in the text, or None where that cannot be told."""
    is_last = number + 1 == len(chat.messages)
    until = text if is_last else _prefix(chat, number + 1, template)
    prompt = _prefix(chat, number, template, add_generation_prompt=True)
    if until is None or prompt is None or not text.startswith(until):
        return None
    if not until.startswith(prompt):  # the prompt may open with what the turn leaves out, such as a thought
        before = _prefix(chat, number, template)
        agreed = (n for n, (one, other) in enumerate(zip(prompt, until, strict=False)) if one != other)
        prompt = prompt[: next(agreed, len(until))]
        if before is None or not prompt.startswith(before):
            return None
    return len(prompt), len(until)


def _prefix(chat: Chat, num_turns: int, template: ChatTemplate, **options: Any) -> str | None:
    """Render the first turns; None where the template does not take so few."""
    if not num_turns:
        return None
    try:
        return template.render(chat.messages[:num_turns], chat.tools, **{**chat.variables, **options})
    except DataError:
        return None


def _says_something(message: Mapping[str, Any]) -> bool:
    said = [name for name, value in message.items() if value is not None and name != "role"]
    return bool(said) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str | list | None)


def _cut(text: str, spans: list[Span]) -> Parts:
    borders = sorted({0, len(text), *(place for span in spans for place in span)})
    learnt = {begin for start, end in spans for begin in borders if start <= begin < end}
    pieces = [(text[begin:end].encode("utf-8", "surrogatepass"), begin in learnt) for begin, end in pairwise(borders)]
    return tuple(pieces) or ((b"", True),)


def _wrong(place: str, found: str) -> DataError:
    return DataError(
        "a chat must be a list of turns under 'messages'", f"{place}: {found}", "Correct or remove the line"
    )
