"""Chats as text by the chat template of a tokenizer's folder, as transformers' `apply_chat_template` renders them."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, final

import jinja2.ext
from jinja2.nodes import CallBlock
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace

from mtp_lightning.errors import DataError
from mtp_lightning.files import untrusted
from mtp_lightning.files.untrusted import read_bounded, shown

CONFIG, SPECIAL_TOKENS, TEMPLATE, MORE_TEMPLATES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates",
)
MOST_BYTES = 64 << 20
MOST_CHARACTERS = 64 << 20  # of a chat that is rendered
MOST_ROUNDS = 20_000_000  # of all loops over `range` while one chat is rendered
REASONING = ("reasoning_content", "thinking", "reasoning")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = Mapping[str, Any]
Span = tuple[int, int]
"""Characters [begin, end) of a text."""


@final
@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """The chat templates of a tokenizer, by name, and the special tokens that they write.

    Attributes:
        templates: sources in Jinja; `default` is used, or `tool_use` for a chat with tools.
        variables: what a template sees besides the chat: `bos_token`, `eos_token` and other special tokens.
        where: file or folder that they come from, for messages.
        writes_special_tokens: whether special tokens in what is rendered are to be parsed.
    """

    templates: Mapping[str, str]
    variables: Mapping[str, str] = field(default_factory=dict)
    where: str
    writes_special_tokens: bool = True

    @staticmethod
    def from_folder(folder: Path) -> "ChatTemplate | None":
        """Read the templates of a folder of transformers; None where there is none.

        `chat_template.jinja` and `additional_chat_templates/*.jinja` come before the `chat_template` of
        `tokenizer_config.json`, which is a text or a list of `name` and `template`.

        Raises:
            DataError: a file is damaged.
        """
        config = read_object(folder / CONFIG)
        templates = _files_of(folder) or _templates_of(config.get("chat_template"), folder / CONFIG)
        if not templates:
            return None
        return ChatTemplate(templates=templates, variables=named_tokens(folder, config), where=str(folder))

    @staticmethod
    def from_file(path: Path, variables: Mapping[str, str]) -> "ChatTemplate":
        """Read one template.

        Raises:
            DataError: it cannot be read.
        """
        return ChatTemplate(templates={"default": _text_of(path)}, variables=variables, where=str(path))

    @property
    def marks_learnt(self) -> bool:
        """Whether every template says with `{% generation %}` what the model is to learn."""
        return all(GENERATION.search(source) for source in self.templates.values())

    @property
    def writes_date(self) -> bool:
        """Whether what is rendered depends on the day; SOURCE_DATE_EPOCH (seconds since 1970) sets it."""
        return any("strftime_now" in source for source in self.templates.values())

    def fingerprint(self) -> str:
        """Return a hash of all that decides what is rendered."""
        content = json.dumps([self.templates, self.variables], sort_keys=True)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """Return the text of a chat; `add_generation_prompt` adds what opens the model's next turn.

        Encode it with special tokens parsed and none added. Further variables (`documents`, `enable_thinking`) are
        seen by the template.

        Raises:
            DataError: the template is not valid, or does not take this chat.
        """
        return self.render_marked(messages, tools, add_generation_prompt=add_generation_prompt, **variables)[0]

    def render_marked(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, **variables: Any
    ) -> tuple[str, list[Span]]:
        """Return the text of a chat, and the characters inside `{% generation %}` blocks.

        Raises:
            DataError: the template is not valid, or does not take this chat.
        """
        name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        if name not in self.templates:
            expected = f"several chat templates of {self.where} must have a default one"
            raise DataError(
                expected, shown(", ".join(sorted(self.templates))), "Name one of them: data.chat_template=NAME"
            )
        given = {"documents": None, "add_generation_prompt": False, **self.variables, **variables}
        blocks: list[str] = []
        try:
            compiled, tracker = self._compiled[name]
            tracker.begin(blocks)
            num_characters = 0
            for block in compiled.generate(
                **{**given, "messages": [_taken(one) for one in messages], "tools": _plain(tools)}
            ):
                blocks.append(block)
                num_characters += len(block) + 1  # of an endless loop that writes nothing, too
                if num_characters > MOST_CHARACTERS:
                    raise OverflowError(f"more than {MOST_CHARACTERS:,} characters")
        except Exception as error:  # a template is a program: what it raises is as various
            raise DataError(
                f"the chat template of {self.where} must render the chat",
                f"{type(error).__name__}: {shown(error)}",
                "Correct the chat or its roles, or give another template: data.chat_template=FILE.jinja",
            ) from error
        return "".join(blocks), tracker.spans

    @cached_property
    def _compiled(self) -> "dict[str, tuple[jinja2.Template, _Generation]]":
        compiled = {}
        for name, source in self.templates.items():
            environment = _environment()
            compiled[name] = (environment.from_string(source), environment.generation)  # type: ignore[attr-defined]
        return compiled


PLAIN = ChatTemplate(
    templates={
        "default": "{% for turn in messages %}{{ '<|' + turn.role + '|>\n' }}{% if turn.tool_calls %}"
        "{{ raise_exception('a turn calls tools, which the plain layout does not write') }}"
        "{% elif turn.content is string %}{% set said = turn.content + '\n' %}"
        "{% elif turn.content and turn.content | selectattr('type', 'equalto', 'text') | list == turn.content %}"
        "{% set said = turn.content | map(attribute='text') | join + '\n' %}"
        "{% else %}{{ raise_exception('a turn has no text') }}{% endif %}{% if turn.role == 'assistant' %}"
        "{% generation %}{{ said }}{% endgeneration %}{% else %}{{ said }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    },
    where="the plain layout",
    writes_special_tokens=False,
)
"""Roles as marks on lines of their own, in ordinary text with every tokenizer: for models without a template."""


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a small file; an empty one where there is no file.

    Raises:
        DataError: it cannot be read, or is no JSON object.
    """
    if not path.exists():
        return {}
    try:
        return untrusted.read_object(path)
    except (OSError, untrusted.OddFileError) as error:
        raise _damaged(path, shown(error)) from error


def named_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that have a name (`bos_token`, `eos_token`, …), as transformers finds them."""
    legacy = {} if "added_tokens_decoder" in config else read_object(folder / SPECIAL_TOKENS)
    both = {**config, **legacy}
    extra = both.get("extra_special_tokens")
    named = {**both, **(extra if isinstance(extra, dict) else {})}
    tokens = {name: content_of(value) for name, value in named.items() if name.endswith("_token")}
    return {name: token for name, token in tokens.items() if token is not None}


def content_of(token: Any) -> str | None:
    """Return the text of a token that is written as a text or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _files_of(folder: Path) -> dict[str, str]:
    files = {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if (folder / TEMPLATE).exists():
        files["default"] = folder / TEMPLATE
    return {name: _text_of(path) for name, path in files.items()}


def _text_of(path: Path) -> str:
    try:
        return read_bounded(path, MOST_BYTES).decode().replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, ValueError) as error:
        raise _damaged(path, shown(error)) from error


def _templates_of(value: Any, path: Path) -> dict[str, str]:
    if value is None or isinstance(value, str):
        return {} if value is None else {"default": value}
    pairs = value if isinstance(value, list) else [value]
    named = [(one.get("name"), one.get("template")) for one in pairs if isinstance(one, dict)]
    templates = {name: text for name, text in named if isinstance(name, str) and isinstance(text, str)}
    if len(templates) < len(pairs):
        raise _damaged(path, f"chat_template: {shown(value)}")
    return templates


def _damaged(path: Path, found: str) -> DataError:
    expected = f"{path} must be as transformers writes it"
    return DataError(expected, found, "Download the file again, or leave it out of the folder")


def _taken(message: Message) -> dict[str, Any]:
    """Return a message without the fields that are null; what a model thought goes by each of its names."""
    taken = {name: _plain(value) for name, value in message.items() if value is not None}
    thought = next((taken[name] for name in REASONING if name in taken), None)
    return taken if thought is None else {"thinking": thought, **taken, "reasoning_content": thought}


def _plain(value: Any) -> Any:
    """Return a value of JSON's types, so that a template sees no object with methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"<{type(value).__name__}>"


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` … `{% endgeneration %}`: notes which characters lie inside."""

    tags = {"generation"}  # noqa: RUF012 - as the library declares it

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(generation=self)
        self.begin([])

    def begin(self, blocks: list[str]) -> None:
        """Start anew, with the blocks of text rendered so far."""
        self._blocks = blocks
        self._num_rounds = 0
        self.spans: list[Span] = []

    def counted_range(self, *limits: int) -> range:
        """Return a range, unless those of one chat are together too long: loops within loops would not end.

        Raises:
            OverflowError: They are.
        """
        numbers = safe_range(*limits)
        self._num_rounds += len(numbers)
        if self._num_rounds > MOST_ROUNDS:
            raise OverflowError(f"loops of more than {MOST_ROUNDS:,} rounds")
        return numbers

    def parse(self, parser: Any) -> CallBlock:
        """Compile the tag."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        block = CallBlock(self.call_method("_note"), [], [], body)
        block.set_lineno(line)
        return block

    def _note(self, caller: Callable[[], str]) -> str:
        text = caller()
        begin = sum(map(len, self._blocks))
        self.spans.append((begin, begin + len(text)))
        return text


class _Names(Namespace):
    """Jinja's `namespace` without names that lead into Python."""

    def __init__(*args: Any, **values: Any) -> None:  # a template may name a value `self`
        self, *rest = args
        names = dict(*rest, **values)
        for name in names:
            _check_name(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace must not have the name {name!r}")


class _Dict:
    """`dict` for templates: it makes one, and has nothing else."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
        optimized=False,  # else the product of two constants is worked out, and written out, when it is compiled
    )
    environment.filters["tojson"] = _to_json
    environment.globals["range"] = environment.generation.counted_range  # type: ignore[attr-defined]
    environment.globals.update(raise_exception=_raise, strftime_now=_strftime_now, dict=_Dict(), namespace=_Names)
    return environment


def _to_json(value: Any, *given: Any, **named: Any) -> str:
    """Write JSON as it is, not escaped for HTML as Jinja's own filter does."""
    options = dict(zip(("ensure_ascii", "indent", "separators", "sort_keys"), given, strict=False))
    return json.dumps(value, **{"ensure_ascii": False, **options, **named})


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _strftime_now(form: str) -> str:
    given = os.environ.get("SOURCE_DATE_EPOCH")
    return (datetime.fromtimestamp(int(given)) if given else datetime.now()).strftime(form)
