"""The text of tokens as they come: all parts together are the text of all tokens, whatever a tokenizer does at edges.

What a token stands for may depend on those around it: a character in several tokens, the space that a first word
lacks, a run of bytes. So a window of the last tokens is decoded whole, and what it adds to the text before is new.
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import final

import numpy as np

from mtp_lightning.data.tokenizers.base import Tokenizer

Detokenize = Callable[[Sequence[int]], bytes]
UNFINISHED = "\N{REPLACEMENT CHARACTER}".encode()  # what tokenizers write for a part of a character
WINDOW = 32  # tokens that are decoded again before new ones
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


@final
class TextStream:
    """One text in the making, cut where it completes a stop string."""

    def __init__(
        self,
        detokenize: Detokenize,
        prompt: Sequence[int],
        *,
        stop_strings: Sequence[bytes] = (),
        left_out: Collection[int] = (),
        is_open: Callable[[int], bool] = lambda _: False,
    ) -> None:
        """Begin behind a prompt.

        Args:
            detokenize: what tokens stand for.
            prompt: tokens before the text.
            stop_strings: texts that end it.
            left_out: tokens that stand for no text, such as its end.
            is_open: whether the text up to a token may change when another follows, as in a run of bytes.
        """
        self._detokenize, self._left_out, self._is_open = detokenize, left_out, is_open
        self._stops, self._most_tail = stop_strings, max(map(len, stop_strings), default=1) - 1
        self._tokens = list(prompt)
        self._said = b""  # what the tokens held stand for, as far as it has been returned
        self._tail = b""  # end of what has been returned, in which a stop string may have begun
        self.has_stopped = False
        self._shorten()

    def push(self, tokens: Sequence[int]) -> bytes:
        """Add tokens; return the text that is certain by now and has not been returned before."""
        if self.has_stopped:
            return b""
        self._tokens += [token for token in tokens if token not in self._left_out]
        new = self._new()
        text = self._tail + new
        ends = [text.find(stop) + len(stop) for stop in self._stops if stop in text]
        if ends:
            self.has_stopped = True
            return text[len(self._tail) : min(ends)]
        if not new or new.endswith(UNFINISHED) or self._is_open(self._tokens[-1]):
            return b""
        self._said += new
        self._tail = text[max(0, len(text) - self._most_tail) :]
        if len(self._tokens) > 2 * WINDOW:
            self._shorten()
        return new

    def end(self) -> bytes:
        """Return what is left of the text."""
        return b"" if self.has_stopped else self._new()

    def _new(self) -> bytes:
        whole = self._detokenize(self._tokens)
        while self._said.endswith(UNFINISHED) and not whole.startswith(self._said):
            self._said = self._said.removesuffix(UNFINISHED)  # the prompt ended amid a character
        return whole[len(self._said) :]

    def _shorten(self) -> None:
        """Forget all tokens but the last, which begin with a whole character."""
        length = WINDOW
        while length < len(self._tokens) and self._detokenize(self._tokens[-length:]).startswith(UNFINISHED):
            length += WINDOW
        self._tokens = self._tokens[-length:]
        self._said = self._detokenize(self._tokens)


def detokenizer(tokenizer: Tokenizer) -> Detokenize:
    """Return what decodes lists of tokens."""
    return lambda tokens: tokenizer.decode(np.asarray(tokens, dtype=np.int64))


def text_stream(
    tokenizer: Tokenizer, prompt: Sequence[int], *, stop_strings: Sequence[bytes] = (), left_out: Collection[int] = ()
) -> TextStream:
    """Begin the text of a tokenizer's tokens behind a prompt."""
    return TextStream(
        detokenizer(tokenizer),
        prompt,
        stop_strings=stop_strings,
        left_out=left_out,
        is_open=lambda token: BYTE.fullmatch(tokenizer.printable(token)) is not None,
    )
