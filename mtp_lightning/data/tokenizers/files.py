"""Tokenizers that are files: `tokenizer.json` of Hugging Face's library, `*.model` of SentencePiece."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from mtp_lightning.data.text.extras import import_extra
from mtp_lightning.data.tokenizers.base import TokenArray, Tokenizer, visible
from mtp_lightning.errors import DataError
from mtp_lightning.files.untrusted import read_bounded, shown

MOST_BYTES = 1 << 30
ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<|end▁of▁sentence|>",
    "<｜end▁of▁sentence｜>",  # noqa: RUF001 - DeepSeek's own spelling, with wide bars
)
"""How published tokenizers spell the token that ends a document."""


@final
class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`; special tokens spelled out in a text are taken as ordinary text."""

    def __init__(self, path: Path, *, end_of_document: int | None) -> None:
        """Open the file; the end of a document is its one token among `ENDS` unless given.

        Raises:
            DataError: The file or the library `tokenizers` cannot be loaded, or the end is in doubt.
        """
        library = import_extra("tokenizers", f"read the tokenizer {path.name}")
        content = _read(path)
        try:
            self._inner: Any = library.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises plain Exception
            raise _damaged(path, "a tokenizer.json", error) from error
        self._inner.no_truncation()  # a file may ask for both, which would cut documents and fill them up
        self._inner.no_padding()
        self._inner.encode_special_tokens = True
        self._sha256 = hashlib.sha256(content).hexdigest()
        ids: dict[str, int] = self._inner.get_vocab(with_added_tokens=True)
        found = {name: ids[name] for name in ENDS if name in ids}
        self.name = path.name
        if not ids:
            raise _damaged(path, "a tokenizer.json", ValueError("no tokens in it"))
        self.vocab_size = max(ids.values()) + 1  # ids may have gaps
        self.end_of_document = _end_of(path, found, end_of_document, self.vocab_size)

    def encode(self, text: bytes) -> TokenArray:
        """Return the ids of a text in UTF-8."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[bytes]) -> list[TokenArray]:
        """Return the ids of texts in UTF-8; the library may use several threads (TOKENIZERS_PARALLELISM)."""
        decoded = [text.decode() for text in texts]
        try:
            encoded = self._inner.encode_batch_fast(decoded, add_special_tokens=False)
        except Exception as error:  # plain: of a file that lacks the token for what it does not know
            raise _damaged(Path(self.name), "a tokenizer.json that can encode any text", error) from error
        return [np.array(one.ids, dtype=np.uint32) for one in encoded]

    def decode(self, tokens: NDArray[np.integer[Any]]) -> bytes:
        """Return the text of the ids in UTF-8, leaving out end-of-document."""
        ids = tokens[tokens != self.end_of_document].tolist()
        return str(self._inner.decode(ids, skip_special_tokens=False)).encode()

    def printable(self, token: int) -> str:
        """Return the token as the file spells it (byte-level tokenizers write a space as `Ġ`)."""
        return "<end>" if token == self.end_of_document else visible(self._inner.id_to_token(token) or f"#{token}")

    def fingerprint(self) -> str:
        """Return the sha256 of the file."""
        return self._sha256


@final
class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `*.model`; control symbols spelled out in a text are taken as ordinary text."""

    def __init__(self, path: Path, *, end_of_document: int | None) -> None:
        """Open the file; the end of a document is its end-of-sentence id unless given.

        Raises:
            DataError: The file or the library `sentencepiece` cannot be loaded, or it has no end.
        """
        library = import_extra("sentencepiece", f"read the tokenizer {path.name}")
        content = _read(path)
        self._inner: Any = library.SentencePieceProcessor()
        try:
            self._inner.LoadFromSerializedProto(content)
        except (RuntimeError, OSError) as error:
            raise _damaged(path, "a SentencePiece model", error) from error
        self._sha256 = hashlib.sha256(content).hexdigest()
        own = self._inner.eos_id()
        self.name = path.name
        self.vocab_size = int(self._inner.get_piece_size())
        if not self.vocab_size:
            raise _damaged(path, "a SentencePiece model", ValueError("no pieces in it"))
        found = {self._inner.id_to_piece(own): own} if 0 <= own < self.vocab_size else {}
        self.end_of_document = _end_of(path, found, end_of_document, self.vocab_size)

    def encode(self, text: bytes) -> TokenArray:
        """Return the ids of a text in UTF-8."""
        return np.array(self._inner.encode(text.decode(), out_type=int), dtype=np.uint32)

    def decode(self, tokens: NDArray[np.integer[Any]]) -> bytes:
        """Return the text of the ids in UTF-8, leaving out end-of-document."""
        return str(self._inner.decode(tokens[tokens != self.end_of_document].tolist())).encode()

    def printable(self, token: int) -> str:
        """Return the piece as the model spells it (a space is `▁`)."""
        return "<end>" if token == self.end_of_document else visible(self._inner.id_to_piece(token))

    def fingerprint(self) -> str:
        """Return the sha256 of the file."""
        return self._sha256


FILE_TOKENIZERS: dict[str, Callable[..., Tokenizer]] = {
    ".json": HuggingFaceTokenizer,
    ".model": SentencePieceTokenizer,
}


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        hint = "Correct data.tokenizer: byte, or the path of a tokenizer.json or SentencePiece *.model"
        raise DataError(f"the tokenizer {str(path.absolute())!r} must be readable", str(error), hint) from error


def _damaged(path: Path, what: str, error: Exception) -> DataError:
    return DataError(f"{path} must be {what}", shown(error).strip() or type(error).__name__, "Download the file again")


def _end_of(path: Path, found: dict[str, int], given: int | None, vocab_size: int) -> int:
    """Return the end-of-document id: the one given, else the only one found."""
    if given is None and len(found) == 1:
        return next(iter(found.values()))
    if given is not None and 0 <= given < vocab_size:
        return given
    names = ", ".join(f"{shown(name)} = {number}" for name, number in found.items()) or "none of the usual ones"
    expected = f"one token of {path.name} must end a document"
    if given is not None:
        expected, names = f"data.end_of_document must be below the {vocab_size:,} ids of {path.name}", f"{given:,}"
    raise DataError(expected, names, "Give its id: data.end_of_document=ID (--end-of-document ID)")
