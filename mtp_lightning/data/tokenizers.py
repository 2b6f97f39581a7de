"""Tokenizers: bytes to token ids and back."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from mtp_lightning.errors import DataError

TokenArray = NDArray[np.unsignedinteger[Any]]


class Tokenizer(ABC):
    """Turn the bytes of a document into token ids; text never yields the end-of-document id."""

    name: str
    vocabulary: int
    end_of_document: int
    takes_any_bytes: bool = False  # else UTF-8 only

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
    vocabulary = 257
    end_of_document = 256
    takes_any_bytes = True

    def encode(self, text: bytes) -> TokenArray:
        """Return the bytes as they are: text that is not UTF-8 is neither refused nor changed."""
        return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)

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


TOKENIZERS: dict[str, type[Tokenizer]] = {"byte": ByteTokenizer}


def open_tokenizer(spec: str, *, end_of_document: int | None = None) -> Tokenizer:
    """Return the tokenizer of a name, or that of a `tokenizer.json` (Hugging Face) or `*.model` (SentencePiece) file.

    The end-of-document id is the tokenizer's own unless given.

    Raises:
        DataError: There is none, its file or its library cannot be loaded, or it has no end-of-document id.
    """
    if spec in TOKENIZERS:
        return _with_own_end(TOKENIZERS[spec](), end_of_document)
    from mtp_lightning.data.tokenizer_files import FILE_TOKENIZERS

    path = Path(spec).expanduser()
    if path.suffix not in FILE_TOKENIZERS:
        names, suffixes = ", ".join(TOKENIZERS), " or ".join(f"*{suffix}" for suffix in FILE_TOKENIZERS)
        raise DataError(
            "data.tokenizer must name a tokenizer", repr(spec), f"Choose one of: {names}, a file {suffixes}"
        )
    return FILE_TOKENIZERS[path.suffix](path, end_of_document=end_of_document)


def token_dtype(vocabulary: int) -> np.dtype[np.unsignedinteger[Any]]:
    """Return the little-endian type in which ids below the vocabulary are stored."""
    return np.dtype("<u2" if vocabulary <= 65_536 else "<u4")


def visible(text: str) -> str:
    """Return a text in which spaces are `␣` and what cannot be seen is escaped.

    >>> visible(" a\\n")
    '␣a\\\\n'
    """
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text).replace(
        " ", "␣"
    )


def _with_own_end(tokenizer: Tokenizer, end_of_document: int | None) -> Tokenizer:
    if end_of_document in (None, tokenizer.end_of_document):
        return tokenizer
    raise DataError(
        f"data.end_of_document of the tokenizer {tokenizer.name} must be {tokenizer.end_of_document}",
        str(end_of_document),
        "Leave data.end_of_document out",
    )
