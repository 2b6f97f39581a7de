"""Chats as text by their template, and which parts of it are learnt."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mtp_lightning.data.text.records import Chat, Parts
from mtp_lightning.data.tokenizers.chat import ChatTemplate, Span
from mtp_lightning.errors import DataError

LEARNT_ROLE = "assistant"


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


def _cut(text: str, spans: list[Span]) -> Parts:
    borders = sorted({0, len(text), *(place for span in spans for place in span)})
    learnt = {begin for start, end in spans for begin in borders if start <= begin < end}
    pieces = [(text[begin:end].encode("utf-8", "surrogatepass"), begin in learnt) for begin, end in pairwise(borders)]
    return tuple(pieces) or ((b"", True),)
