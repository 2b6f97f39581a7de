"""Tokenizers that are files: `tokenizer.json` of Hugging Face's library, `*.model` of SentencePiece."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from mtp_lightning.data.text.extras import import_extra
from mtp_lightning.data.tokenizers.base import Offsets, TokenArray, Tokenizer, visible
from mtp_lightning.data.tokenizers.beside import config_beside
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
CONVERT = (
    'Write a tokenizer.json once, with transformers: python -c "from transformers import AutoTokenizer as A; '
    "A.from_pretrained('{0}').save_pretrained('{0}')\""
)


@final
class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, with what the files beside it add, as transformers reads them.

    Special tokens that a text spells out are ordinary text unless `parse_special_tokens`. Regularisation that draws
    lots (BPE dropout, sampling) is off: a text has one encoding.
    """

    def __init__(
        self,
        path: Path,
        *,
        end_of_document: int | None,
        parse_special_tokens: bool = False,
        add_special_tokens: bool = False,
    ) -> None:
        """Open the file.

        The end of a document is, unless given, the `eos_token` of the files beside it, or the one token among `ENDS`.

        Raises:
            DataError: A file or the library `tokenizers` cannot be loaded, or the end is in doubt.
        """
        library = import_extra("tokenizers", f"read the tokenizer {path.name}")
        content = _read(path)
        try:
            self._inner: Any = library.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises plain Exception
            raise _damaged(path, "a tokenizer.json", error) from error
        self._inner.no_truncation()  # a file may ask for both, which would cut documents and fill them up
        self._inner.no_padding()
        for lot in ("dropout", "alpha", "nbest_size"):
            if getattr(self._inner.model, lot, None) is not None:
                setattr(self._inner.model, lot, None)
        config = config_beside(path)
        added = config.add_tokens(self._inner, library.AddedToken)
        self._is_split = config.splits_special_tokens  # whether parsing is off even where transformers would parse
        self.parses_special_tokens = parse_special_tokens
        self._sha256 = hashlib.sha256(content + added.encode()).hexdigest()
        ids: dict[str, int] = self._inner.get_vocab(with_added_tokens=True)
        self.name = path.name
        if not ids:
            raise _damaged(path, "a tokenizer.json", ValueError("no tokens in it"))
        self.vocab_size = max(ids.values()) + 1  # ids may have gaps
        if config.odd_end is not None and end_of_document is None:
            hint = "Correct it, or give its id: data.end_of_document=ID (--end-of-document ID)"
            raise DataError(f"eos_token beside {path} must be one token", shown(config.odd_end), hint)
        named = [config.tokens["eos_token"]] if config.tokens.get("eos_token") in ids else ENDS
        self.end_of_document = _end_of(
            path, {name: ids[name] for name in named if name in ids}, end_of_document, self.vocab_size
        )
        unknown = getattr(self._inner.model, "unk_token", None) or config.tokens.get("unk_token")
        self.unknown = ids.get(unknown) if unknown else None
        special = [token.content for token in self._inner.get_added_tokens_decoder().values() if token.special]
        self.special_tokens = tuple(filter(None, special))
        self._take_frame(path, is_wanted=add_special_tokens)

    def _take_frame(self, path: Path, *, is_wanted: bool) -> None:
        """Take the post-processor out, which trims offsets; keep what it adds around a text where that is wanted."""
        if is_wanted:
            bare, framed = (self._inner.encode("a", add_special_tokens=add).ids for add in (False, True))
            begin = next((n for n in range(len(framed)) if framed[n : n + len(bare)] == bare), None)
            if begin is None:
                raise DataError(
                    f"the post-processor of {path} must add tokens before and after a text only",
                    f"{framed} from {bare}",
                    "Leave data.add_special_tokens out",
                )
            self.opening, closing = tuple(framed[:begin]), framed[begin + len(bare) :]
            self.closing = tuple(closing[:-1] if closing[-1:] == [self.end_of_document] else closing)
        self._inner.post_processor = None

    def encode(self, text: bytes) -> TokenArray:
        """Return the ids of a text in UTF-8."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[bytes]) -> list[TokenArray]:
        """Return the ids of texts in UTF-8; the library may use several threads (TOKENIZERS_PARALLELISM)."""
        encoded = self._batch(self._inner.encode_batch_fast, texts, parses=self.parses_special_tokens)
        return [np.array(one.ids, dtype=np.uint32) for one in encoded]

    def encode_with_offsets(
        self, texts: Sequence[bytes], *, parse_special_tokens: bool
    ) -> list[tuple[TokenArray, Offsets]]:
        """Return the ids of texts in UTF-8, and the characters of each token."""
        encoded = self._batch(self._inner.encode_batch, texts, parses=parse_special_tokens)
        return [
            (np.array(one.ids, dtype=np.uint32), np.array(one.offsets, dtype=np.int64).reshape(-1, 2))
            for one in encoded
        ]

    def _batch(self, encode: Callable[..., list[Any]], texts: Sequence[bytes], *, parses: bool) -> list[Any]:
        self._inner.encode_special_tokens = not parses or self._is_split
        decoded = [text.decode() for text in texts]
        try:
            return encode(decoded, add_special_tokens=False)
        except BaseException as error:
            # Plain Exception: of a file that lacks the token for what it does not know. A panic, which is none: of an
            # expression that gives up on a text.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise _damaged(Path(self.name), "a tokenizer.json that can encode any text", error) from error

    def decode(self, tokens: NDArray[np.integer[Any]]) -> bytes:
        """Return the text of the ids in UTF-8, leaving out end-of-document."""
        ids = tokens[tokens != self.end_of_document].tolist()
        return str(self._inner.decode(ids, skip_special_tokens=False)).encode()

    def printable(self, token: int) -> str:
        """Return the token as the file spells it (byte-level tokenizers write a space as `Ġ`)."""
        return "<end>" if token == self.end_of_document else visible(self._inner.id_to_token(token) or f"#{token}")

    def fingerprint(self) -> str:
        """Return the sha256 of the file, and of the tokens that files beside it add."""
        return self._sha256


@final
class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece `*.model`; control symbols spelled out in a text are taken as ordinary text."""

    def __init__(
        self,
        path: Path,
        *,
        end_of_document: int | None,
        parse_special_tokens: bool = False,
        add_special_tokens: bool = False,
    ) -> None:
        """Open the file; the end of a document is its end-of-sentence id unless given.

        Raises:
            DataError: The file or the library `sentencepiece` cannot be loaded, it has no end, or special tokens are
                to be parsed or added, which the library does not do.
        """
        self._path = path
        if parse_special_tokens or add_special_tokens:
            raise self._no_special_tokens()
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
        self.unknown = int(self._inner.unk_id())
        self.end_of_document = _end_of(path, found, end_of_document, self.vocab_size)

    def encode(self, text: bytes) -> TokenArray:
        """Return the ids of a text in UTF-8."""
        return np.array(self._inner.encode(text.decode(), out_type=int), dtype=np.uint32)

    def encode_with_offsets(
        self, texts: Sequence[bytes], *, parse_special_tokens: bool
    ) -> list[tuple[TokenArray, Offsets]]:
        """Return the ids of texts in UTF-8, and the characters of each piece.

        Raises:
            DataError: Special tokens are to be parsed.
        """
        if parse_special_tokens:
            raise self._no_special_tokens()
        encoded = self._inner.encode([text.decode() for text in texts], return_type="offset_mapping")
        return [
            (np.array(one["ids"], dtype=np.uint32), np.array(one["offsets"], dtype=np.int64).reshape(-1, 2))
            for one in encoded
        ]

    def decode(self, tokens: NDArray[np.integer[Any]]) -> bytes:
        """Return the text of the ids in UTF-8, leaving out end-of-document."""
        return str(self._inner.decode(tokens[tokens != self.end_of_document].tolist())).encode()

    def printable(self, token: int) -> str:
        """Return the piece as the model spells it (a space is `▁`)."""
        return "<end>" if token == self.end_of_document else visible(self._inner.id_to_piece(token))

    def fingerprint(self) -> str:
        """Return the sha256 of the file."""
        return self._sha256

    def _no_special_tokens(self) -> DataError:
        return no_special_tokens(f"the SentencePiece model {self._path}", hint=CONVERT.format(self._path.parent))


FILE_TOKENIZERS: dict[str, Callable[..., Tokenizer]] = {
    ".json": HuggingFaceTokenizer,
    ".model": SentencePieceTokenizer,
}


def no_special_tokens(what: str, *, hint: str) -> DataError:
    """Return the error that a tokenizer cannot parse or add special tokens."""
    return DataError("special tokens and chat templates need a tokenizer.json", what, hint)


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        hint = (
            "Correct data.tokenizer: byte, a folder with a tokenizer.json, or a tokenizer.json or SentencePiece *.model"
        )
        raise DataError(f"the tokenizer {str(path.absolute())!r} must be readable", str(error), hint) from error


def _damaged(path: Path, what: str, error: BaseException) -> DataError:
    found = shown(error).strip() or type(error).__name__
    hint = f"Download the file again. {CONVERT.format(path.parent)}" if path.suffix else "Download the file again"
    return DataError(f"{path} must be {what}", found, hint)


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
