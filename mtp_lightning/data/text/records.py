"""Records: what a line of JSON or a row of a table says, and which parts of it are learnt."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from mtp_lightning.errors import DataError
from mtp_lightning.files.untrusted import shown
from mtp_lightning.recipe.rules.data import (
    ENCODING_EXPECTED,
    ENCODING_HINT,
    TEMPLATE_EXPECTED,
    TEMPLATE_HINT,
    is_encoding,
    is_template,
    template_parts,
)
from mtp_lightning.recipe.schema.data import DataSection

CHATS = ("messages", "conversations", "conversation")
ASKING = ("prompt", "instruction", "question", "query", "problem", "input", "context")
ASKED = (["instruction"], ["instruction", "input"], ["instruction", "context"])
"""Of Alpaca and Dolly: what is asked, and on what."""

ANSWERING = ("completion", "output", "response", "answer", "solution")
SYSTEM = ("system", "system_prompt")
BESIDE_A_CHAT = ("tools", "documents", "chat_template_kwargs", *SYSTEM)
RESERVED = ("messages", "tools", "add_generation_prompt", "self")
"""What a template is given for each chat, and no row may set."""

KNOWN = frozenset({"text", *CHATS, *ASKING, *ANSWERING, *BESIDE_A_CHAT})
"""Fields that are looked for where none is named."""

ROLES = {
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model", "assistant"), "assistant"),
    **dict.fromkeys(("human", "user"), "user"),
    **{name: name for name in ("system", "developer", "tool", "function")},
    "observation": "tool",
    "function_response": "tool",
}
"""Roles of ShareGPT (`from`), by the names that chat templates know."""

Parts = tuple[tuple[bytes, bool], ...]
"""Texts in their order, and whether each is learnt or only read."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How documents are read: the fields of the same names in the section `data` of a recipe."""

    text_field: str | None = None
    template: str | None = None
    on_bad_row: Literal["refuse", "skip"] = "refuse"
    encoding: str | None = None

    @staticmethod
    def of(data: DataSection) -> "Reading":
        """Take what a recipe says."""
        return Reading(**{field.name: getattr(data, field.name) for field in fields(Reading)})

    def check(self) -> None:
        """Check what is not of a recipe, whose rules have checked it.

        Raises:
            DataError: The template names no fields, or the encoding is not known, or two fields exclude each other.
        """
        if self.text_field and self.template:
            raise DataError("one of text_field and template must be given", "both", "Keep one of the two")
        if self.template is not None and not is_template(self.template):
            raise DataError(f"the template {TEMPLATE_EXPECTED}", shown(repr(self.template)), TEMPLATE_HINT)
        if self.encoding is not None and not is_encoding(self.encoding):
            raise DataError(f"the encoding {ENCODING_EXPECTED}", shown(repr(self.encoding)), ENCODING_HINT)

    @property
    def skips(self) -> bool:
        """Whether what is no document is left out."""
        return self.on_bad_row == "skip"

    @property
    def names_fields(self) -> bool:
        """Whether it says where a record has its text."""
        return bool(self.text_field or self.template)

    def columns_of(self, names: Sequence[str]) -> list[str]:
        """Return the columns of a table that are needed, of those that there are."""
        named = [self.text_field, *BESIDE_A_CHAT] if self.text_field else []
        if self.template:
            named = [field for _, field in template_parts(self.template) if field]
        wanted = {root for name in named for root in (name, name.partition(".")[0])} or KNOWN
        return [name for name in names if name in wanted]


AS_KNOWN = Reading()


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


@dataclass(frozen=True, kw_only=True)
class Document:
    """One piece of text that predicts nothing beyond its own end."""

    name: str
    parts: Parts
    chat: Chat | None = None  # of which a template makes the parts

    @property
    def text(self) -> bytes:
        """All of the text."""
        return b"".join(text for text, _ in self.parts)

    @property
    def is_empty(self) -> bool:
        """Tell whether there is nothing to learn in it."""
        return not any(text for text, is_learnt in self.parts if is_learnt)


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What would be a document and is none."""

    place: str  # file and row
    kind: str  # under which it is counted
    found: str = ""
    hint: str = ""
    is_fault: bool = True  # it is refused, unless such are to be left out


class RowFault(Exception):
    """Why a record is no document."""

    def __init__(self, kind: str, found: str, hint: str = "") -> None:
        super().__init__(kind, found, hint)  # all of them, to cross process borders
        self.kind, self.found, self.hint = kind, found, hint


def document_of_record(record: Any, name: str, reading: Reading) -> Document:
    """Return the document that a record says.

    By the template or the field that is named, else by the first of these that the record has: a chat under `messages`
    or `conversations`; `prompt` and `completion`; `text`; one question and one answer under other names.

    >>> document_of_record({"prompt": "2+2=", "completion": "4"}, "x", Reading()).parts
    ((b'2+2=', False), (b'4', True))
    >>> document_of_record({"title": "a", "n": {"b": 3}}, "x", Reading(template="{title}: {n.b}")).text
    b'a: 3'

    Raises:
        RowFault: It says none, or not clearly which.
    """
    if not reading.names_fields and _is_chat(record):
        record = {"messages": record}
    if not isinstance(record, dict):
        raise RowFault("no object", f"a {_kind(record)}")
    if reading.template:
        return Document(name=name, parts=((_bytes(_filled(reading.template, record)), True),))
    if reading.text_field:
        value = _looked_up(record, reading.text_field)
        if isinstance(value, list):
            return _chat_document(name, _chat(record, _with_system(record, _messages(value))))
        return Document(name=name, parts=((_text(value, reading.text_field), True),))
    return _known_document({key: value for key, value in record.items() if value is not None}, record, name)


def _is_chat(record: Any) -> bool:
    """Tell whether a record is a list of turns and nothing else."""
    is_list = isinstance(record, list) and bool(record)
    return is_list and all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in record)


def _known_document(given: Mapping[str, Any], record: Mapping[str, Any], name: str) -> Document:
    """Read a record by the names of its fields; `given` lacks those that are null."""
    chats = [key for key in CHATS if key in given]
    if chats:
        chat = _chat(given, _with_system(given, _messages(given[chats[0]])))
        return _chat_document(name, chat)
    if "completion" not in given and "text" in given:
        return Document(name=name, parts=((_text(given["text"], "text"), True),))
    if "prompt" in given and "completion" in given:
        return _pair(given, ["prompt"], "completion", name)
    asking, answering = ([key for key in keys if key in given] for keys in (ASKING, ANSWERING))
    if len(answering) != 1 or not (asking in ASKED or (len(asking) == 1 and asking != ["context"])):
        raise _unknown(record, [*asking, *answering])
    return _pair(given, asking, answering[0], name)


def _pair(given: Mapping[str, Any], asking: list[str], answering: str, name: str) -> Document:
    """Read a question and its answer: `prompt` and `completion` as they are, other names as a chat of two turns."""
    question, answer = given[asking[0]], given[answering]
    if isinstance(question, list) and isinstance(answer, list):
        before = _with_system(given, _messages(question))
        chat = _chat(given, before + _messages(answer), num_given=len(before))
        return _chat_document(name, chat)
    texts, learnt = [_text(given[key], key) for key in asking], _text(answer, answering)
    if (asking, answering) == (["prompt"], "completion"):
        return Document(name=name, parts=((texts[0], False), (learnt, True)))
    turns = [("user", b"\n".join(text for text in texts if text)), ("assistant", learnt)]
    messages = [{"role": role, "content": text.decode("utf-8", "surrogatepass")} for role, text in turns]
    return _chat_document(name, Chat(messages=_with_system(given, messages)))


def _chat_document(name: str, chat: Chat) -> Document:
    return Document(name=name, parts=(), chat=chat)


def _messages(value: Any) -> list[dict[str, Any]]:
    """Return turns with `role` and `content`, also of ShareGPT's (`from`, `value`), of a JSON text, or of columns."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowFault("damaged JSON", f"a chat that is a text but no JSON: {shown(error)}") from error
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, row, strict=False)) for row in zip(*value.values(), strict=False)]
    turns = value if isinstance(value, list) and value else [value]
    return [_message(number, turn) for number, turn in enumerate(turns)]


def _message(number: int, turn: Any) -> dict[str, Any]:
    if isinstance(turn, list) and all(isinstance(pair, tuple) for pair in turn):
        turn = dict(turn)  # a map of Arrow's
    if isinstance(turn, dict) and "from" in turn and "role" not in turn:
        role = ROLES.get(str(turn["from"]).lower())
        if role is None:
            raise RowFault("chat of unknown roles", f"message {number} is from {shown(repr(turn['from']))}")
        others = {key: value for key, value in turn.items() if key not in ("from", "value")}
        turn = {"role": role, "content": turn.get("value"), **others}
    if (
        not isinstance(turn, dict)
        or not isinstance(turn.get("role"), str)
        or not turn.keys() & {"content", "tool_calls"}
        or not isinstance(turn.get("content"), str | list | None)
    ):
        found = f"message {number} is not an object with strings under 'role' and 'content'"
        raise RowFault("chat without turns", found)
    return {key: value for key, value in turn.items() if value is not None or key == "content"}


def _with_system(given: Mapping[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put what stands under `system` before the turns, unless these begin with such a turn."""
    said = next((given[key] for key in SYSTEM if isinstance(given.get(key), str) and given[key]), None)
    if said is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": said}, *messages]


def _tools(given: Mapping[str, Any]) -> list[Any] | None:
    tools = given.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RowFault("damaged JSON", f"'tools' is a text but no JSON: {shown(error)}") from error
    return tools if isinstance(tools, list) and tools else None


def _chat(given: Mapping[str, Any], messages: list[dict[str, Any]], *, num_given: int = 0) -> Chat:
    """Add to turns what else a record says to the template."""
    more = given.get("chat_template_kwargs") or {}
    if not isinstance(more, dict) or more.keys() & RESERVED:
        found = f"chat_template_kwargs {shown(repr(more))}"
        hint = f"Make it an object without {', '.join(RESERVED)}; tools stand beside it, under 'tools'"
        raise RowFault("chat_template_kwargs that cannot be passed on", found, hint)
    variables = {"documents": given.get("documents"), **more}
    return Chat(messages=messages, tools=_tools(given), variables=variables, num_given=num_given)


def _filled(template: str, record: Mapping[str, Any]) -> str:
    """Put values into a template: texts and numbers, nothing computed."""
    pieces = []
    for literal, name in template_parts(template):
        pieces.append(literal)
        if name:
            value = _looked_up(record, name)
            if not isinstance(value, str | int | float):
                raise RowFault(*_fault_of(value, name))
            pieces.append(value if isinstance(value, str) else json.dumps(value))
    return "".join(pieces)


def _looked_up(record: Mapping[str, Any], field: str) -> Any:
    """Return the value of a field; dots lead into objects within objects."""
    value: Any = record
    for name in [field] if field in record else field.split("."):
        if not isinstance(value, dict) or name not in value:
            raise RowFault(f"no field {field}", f"keys {shown(sorted(map(str, record)))}")
        value = value[name]
    return value


def _text(value: Any, field: str) -> bytes:
    if isinstance(value, bytes):  # of a table whose writer did not say that it is text
        try:
            value.decode()
        except UnicodeDecodeError as error:
            raise RowFault("invalid UTF-8", f"{field!r}: {error}") from error
        return value
    if not isinstance(value, str):
        raise RowFault(*_fault_of(value, field))
    return _bytes(value)


def _fault_of(value: Any, field: str) -> tuple[str, str]:
    return f"no text under {field}", f"{field!r} is {'null' if value is None else f'a {_kind(value)}'}"


def _unknown(record: Mapping[str, Any], found: list[str]) -> RowFault:
    """Say of which fields a document could be made, and how to name one."""
    nulls = [key for key in record if key in KNOWN and record[key] is None]
    if nulls:
        return RowFault(*_fault_of(None, nulls[0]))
    texts = [key for key, value in record.items() if isinstance(value, str) and re.fullmatch(r"[\w.-]+", str(key))]
    hint = ""
    if texts:
        parts = "\\n".join(f"{{{key}}}" for key in (found if len(found) > 1 else texts)[:3])
        hint = f"Name the field: data.text_field={texts[0]} (--text-field), or several: data.template='{parts}'"
    for key, value in record.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            hint = f"What lies under {shown(repr(key))} may be the records: write each on a line of its own"
    kind = "several questions or answers" if len(found) > 2 else "no known field"
    return RowFault(kind, f"keys {shown(sorted(map(str, record)))}", hint)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
