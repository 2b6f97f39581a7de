"""Tokenizers: bytes to token ids and back."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.unsignedinteger[Any]]
Offsets = NDArray[np.int64]
"""(N, 2): where each token begins and ends in its text, in characters."""


class Tokenizer(ABC):
    """Turn the bytes of a document into token ids; text never yields the end-of-document id."""

    name: str
    vocab_size: int
    end_of_document: int
    takes_any_bytes: bool = False  # else UTF-8 only
    opening: tuple[int, ...] = ()
    """Ids to put before a document (begin of sequence): what a post-processor adds, where that is asked for."""
    closing: tuple[int, ...] = ()
    """Ids to put after a document, without an end of document at their end."""
    unknown: int | None = None
    """Id that stands for what the tokenizer does not know."""
    special_tokens: tuple[str, ...] = ()
    """Spellings of the special tokens."""
    parses_special_tokens: bool = False
    """Whether special tokens that a text spells out become their ids."""

    @abstractmethod
    def encode(self, text: bytes) -> TokenArray:
        """Return the token ids of one document, without the end-of-document id.

        Raises:
            UnicodeDecodeError: The text is not UTF-8, and the tokenizer does not take any bytes.
        """

    def encode_many(self, texts: Sequence[bytes]) -> list[TokenArray]:
        """Return what `encode` gives for each text, in less time."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def encode_with_offsets(
        self, texts: Sequence[bytes], *, parse_special_tokens: bool
    ) -> list[tuple[TokenArray, Offsets]]:
        """Return the ids of each text, and which characters (a byte tokenizer: bytes) each of them stands for."""

    @abstractmethod
    def decode(self, tokens: NDArray[np.integer[Any]]) -> bytes:
        """Return the bytes that the ids stand for; end-of-document stands for none."""

    @abstractmethod
    def printable(self, token: int) -> str:
        """Return one token as a short text without line breaks, spaces or control characters."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash that changes whenever `encode` would give other ids for some text."""


@final
class ByteTokenizer(Tokenizer):
    """One token per byte, whatever the encoding of the text; end-of-document comes after the bytes."""

    name = "byte"
    vocab_size = 257
    end_of_document = 256
    takes_any_bytes = True

    def encode(self, text: bytes) -> TokenArray:
        """Return the bytes as they are: text that is not UTF-8 is neither refused nor changed."""
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

    def encode_with_offsets(
        self, texts: Sequence[bytes], *, parse_special_tokens: bool
    ) -> list[tuple[TokenArray, Offsets]]:
        """Return the bytes; there are no special tokens."""
        begins = [np.arange(len(text)) for text in texts]
        return [(self.encode(text), np.stack([own, own + 1], 1)) for text, own in zip(texts, begins, strict=True)]

    def decode(self, tokens: NDArray[np.integer[Any]]) -> bytes:
        """Return the bytes, leaving out end-of-document."""
        return bytes(tokens[tokens != self.end_of_document].astype(np.uint8).data)

    def printable(self, token: int) -> str:
        """Return the character of a visible ASCII byte, `␣` for a space, an escape such as `\\n` for the rest."""
        if token == self.end_of_document:
            return "<end>"
        return visible(chr(token)) if token < 128 else ascii(chr(token))[1:-1]

    def fingerprint(self) -> str:
        """Return the hash of the definition."""
        return hashlib.sha256(b"byte: id = byte value; end of document = 256").hexdigest()


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Return the little-endian type in which ids below the vocabulary are stored."""
    return np.dtype("<u2" if vocab_size <= 65_536 else "<u4")


def visible(text: str) -> str:
    """Return a text in which spaces are `␣` and what cannot be seen is escaped.

    >>> visible(" a\\n")
    '␣a\\\\n'
    """
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text).replace(
        " ", "␣"
    )
