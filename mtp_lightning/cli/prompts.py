"""Prompts of `mtp generate` and `mtp data generate`: from the command line, from files, as turns of a chat."""

import json
import os
from codecs import BOM_UTF8
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mtp_lightning.errors import DecodingError

if TYPE_CHECKING:
    from mtp_lightning.data.tokenizers.base import Tokenizer
    from mtp_lightning.data.tokenizers.chat import ChatTemplate
    from mtp_lightning.recipe import Recipe

KEYS = ("prompt", "text")
JSON = (".jsonl", ".json")
LONGEST_SHOWN = 60
Messages = Sequence[Mapping[str, Any]]
"""Turns of a chat, each with a `role` and a `content`."""


class Prompt(NamedTuple):
    """What a text begins with."""

    tokens: list[int]
    shown: bytes  # what is printed of it


def texts_of(texts: Sequence[str], *, what: str = "prompt") -> list[bytes]:
    """Encode texts of a command line.

    Raises:
        DecodingError: One is not UTF-8.
    """
    given = [_typed(text) for text in texts]
    return [_encoded(text, f"{what} {number} of {len(texts)}", what) for number, text in enumerate(given, 1)]


def _typed(text: str) -> str:
    """Return what was typed in UTF-8, where the locale's encoding has not been able to tell."""
    try:
        return text.encode("utf-8", "surrogateescape").decode()
    except UnicodeError:
        return text


def read_prompts(given: Path | Sequence[bytes]) -> list[bytes]:
    """Read prompts from a file: one per line, or, from *.jsonl, the `prompt` (or `text`) of every line's object.

    A *.json file is one such object, or a list of them.

    Raises:
        DecodingError: The file cannot be read, holds no prompt, or has a line that is none.
    """
    if not isinstance(given, Path):
        return list(given)
    if given.suffix not in JSON:
        return [line for _, line in _lines(given)]
    return [_text_of(document, line, given, number) for number, line, document in _objects(given)]


def read_chats(given: Path | Sequence[bytes], system: str | None) -> list[Messages]:
    """Read chats: prompts as of `read_prompts`, each a user's turn; or the `messages` of a line's object.

    A *.json file may also be the list of one chat's messages.

    Raises:
        DecodingError: As `read_prompts`.
    """
    before = [] if system is None else [{"role": "system", "content": system}]
    if not isinstance(given, Path) or given.suffix not in JSON:
        texts = read_prompts(given)
        turns = [_decoded(text, f"prompt {number} of {len(texts)}") for number, text in enumerate(texts, 1)]
        return [[*before, {"role": "user", "content": text}] for text in turns]
    chats: list[Messages] = []
    for number, line, document in _objects(given):
        messages = document.get("messages") if isinstance(document, dict) else None
        if messages is None:
            messages = [{"role": "user", "content": _text_of(document, line, given, number).decode()}]
        elif not (isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages)):
            raise _no_prompt(line, given, number)
        chats.append([*before, *messages])
    return chats


def encode_prompts(
    recipe: "Recipe",
    tokenizer: "Tokenizer",
    prompts: Sequence[bytes | Messages],
    *,
    parse_special_tokens: bool = False,
) -> list[Prompt]:
    """Encode prompts, and chats by the recipe's chat template.

    Raises:
        DecodingError: One is not UTF-8, and the tokenizer takes nothing else; or there is no chat template.
        DataError: The template does not take a chat, or the tokenizer has no special tokens.
    """
    from mtp_lightning.data.tokenizers.open import open_tokenizer

    is_chat = any(not isinstance(prompt, bytes) for prompt in prompts)
    template = _template_of(recipe) if is_chat else None
    opening = () if template else tokenizer.opening  # a template writes its own
    if parse_special_tokens or (template and template.writes_special_tokens):
        end = tokenizer.end_of_document
        tokenizer = open_tokenizer(recipe.data.tokenizer, end_of_document=end, parse_special_tokens=True)
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        where = f"prompt {number} of {len(prompts)}"
        if isinstance(prompt, bytes):
            text = shown = prompt
        else:
            assert template is not None
            text, shown = _encoded(template.render(prompt, add_generation_prompt=True), where), b""
        if not tokenizer.takes_any_bytes:
            _decoded(text, where)
        encoded.append(Prompt([*opening, *tokenizer.encode(text).tolist()], shown))
    return encoded


def _template_of(recipe: "Recipe") -> "ChatTemplate":
    from mtp_lightning.data.tokenizers.open import open_chat_template

    template = open_chat_template(recipe.data.tokenizer, recipe.data.chat_template)
    if template is None:
        raise DecodingError(
            "--chat needs a chat template beside the model's tokenizer",
            f"none beside {recipe.data.tokenizer}",
            "Leave --chat out, or put the chat_template.jinja of the model there",
        )
    return template


def _lines(path: Path) -> list[tuple[int, bytes]]:
    """Read the lines of a file that are not empty, each with its number."""
    try:
        lines = path.read_bytes().removeprefix(BOM_UTF8).splitlines()
    except OSError as error:
        raise DecodingError(
            "the file of prompts must be readable", f"{path}: {error.strerror}", "Name another"
        ) from None
    found = [(number, line) for number, line in enumerate(lines, 1) if line]
    if not found:
        raise DecodingError("a file of prompts must hold one", f"none in {path}", "Write one prompt per line")
    return found


def _objects(path: Path) -> list[tuple[int, bytes, Any]]:
    """Parse the lines of a *.jsonl file, or the members of a *.json file, each with its number and how it is shown."""
    if path.suffix == ".json":
        content = b"\n".join(line for _, line in _lines(path))
        document = _parsed(content, path, 1)
        members = document if isinstance(document, list) else [document]
        if not members:
            raise _no_prompt(content, path, 1)
        if any(isinstance(member, dict) and "role" in member for member in members):
            members = [{"messages": members}]
        return [(number, content, member) for number, member in enumerate(members, 1)]
    return [(number, line, _parsed(line, path, number)) for number, line in _lines(path)]


def _parsed(content: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise _no_prompt(content, path, number) from None


def _text_of(document: Any, line: bytes, path: Path, number: int) -> bytes:
    values = [document[key] for key in KEYS if key in document] if isinstance(document, dict) else []
    if not values or not isinstance(values[0], str):
        raise _no_prompt(line, path, number)
    return _encoded(values[0], f"line {number} of {path}")


def _no_prompt(line: bytes, path: Path, number: int) -> DecodingError:
    unit = "line" if path.suffix == ".jsonl" else "member"
    return DecodingError(
        f'every {unit} of a *{path.suffix} file of prompts must be an object with a text "prompt" (or "text"), '
        'or, with --chat, with "messages"',
        f"{unit} {number} of {path}: {line[:LONGEST_SHOWN].decode(errors='replace')}",
        f"Correct the {unit}, or name the file *.txt for one prompt per line",
    )


def _encoded(text: str, where: str, what: str = "prompt") -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise _not_text(text, where, what) from None


def _decoded(text: bytes, where: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise _not_text(os.fsdecode(text), where) from None


def _not_text(text: str, where: str, what: str = "prompt") -> DecodingError:
    return DecodingError(
        f"a {what} must be text in UTF-8",
        f"{where}: {text[:LONGEST_SHOWN]}",
        "Convert it to UTF-8; a model of bytes takes any, as lines of a file: --prompts FILE",
    )
