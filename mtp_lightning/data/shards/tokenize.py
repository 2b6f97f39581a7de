"""From the parts of documents to token ids and loss masks."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mtp_lightning.data.text.documents import Document
from mtp_lightning.data.tokenizers.base import Offsets, TokenArray, Tokenizer

Mask = NDArray[np.uint8]
"""Per token, 1 where it is learnt."""
SAMPLED_BYTES = 2048


def encode_documents(
    documents: Sequence[Document], tokenizer: Tokenizer, *, parses_chats: bool
) -> Iterator[tuple[list[TokenArray], Mask | None]]:
    """Yield the ids of each document with its end, in a few arrays, and its mask if a part of it is only read.

    A document is one text to the tokenizer, whatever its parts. A token is learnt if some of its characters are, so
    one that crosses a border is. An end is added unless the text has it: as its last id or, in a chat, as the special
    token that the template wrote last, white space aside.

    Args:
        documents: with UTF-8 parts, unless the tokenizer takes any bytes.
        tokenizer: says whether special tokens in texts are parsed, and what is added around them.
        parses_chats: whether special tokens are parsed in chats.
    """
    kinds = [_kind(document) for document in documents]
    texts: dict[str, list[bytes]] = {"text": [], "pair": [], "chat": []}
    for document, kind in zip(documents, kinds, strict=True):
        texts[kind].append(document.text)
    plain = iter(tokenizer.encode_many(texts["text"]))
    parses = {"pair": tokenizer.parses_special_tokens, "chat": parses_chats}
    marked = {
        kind: iter(tokenizer.encode_with_offsets(texts[kind], parse_special_tokens=does) if texts[kind] else ())
        for kind, does in parses.items()
    }
    opening, closing, end = (
        [np.array(ids, dtype=np.uint32)] if ids else []
        for ids in (tokenizer.opening, tokenizer.closing, (tokenizer.end_of_document,))
    )
    for document, kind in zip(documents, kinds, strict=True):
        tokens, offsets = (next(plain), None) if kind == "text" else next(marked[kind])
        is_ended = (tokens.size and tokens[-1] == tokenizer.end_of_document) or (
            kind == "chat" and _ends_itself(document, tokenizer)
        )
        before, after = ([], []) if kind == "chat" else (opening, closing)
        pieces = [*before, tokens, *after, *([] if is_ended else end)]
        yield pieces, None if offsets is None else _mask(document, offsets, pieces, len(before), tokenizer)


def learnt_tokens(document: Document, offsets: Offsets, *, in_bytes: bool) -> Mask:
    """Return which tokens (N,) stand for a character of a part that is learnt."""
    sizes = [len(text) if in_bytes else len(text.decode()) for text, _ in document.parts]
    flags = np.repeat(np.array([is_learnt for _, is_learnt in document.parts], dtype=np.int64), sizes)
    if not flags.size:
        return np.zeros(len(offsets), dtype=np.uint8)
    before = np.concatenate([[0], np.cumsum(flags)])  # learnt characters before each place
    begins, ends = offsets[:, 0], offsets[:, 1]
    first = flags[np.minimum(begins, flags.size - 1)]  # a byte of a character may stand for none of it
    return np.where(ends > begins, before[ends] > before[begins], first).astype(np.uint8)


def round_trip(texts: Sequence[bytes], tokenizer: Tokenizer) -> Counter[str]:
    """Count, of the beginnings of some texts, those that do not come back from their ids, and unknown tokens."""
    beginnings = [text[:SAMPLED_BYTES].decode(errors="ignore") for text in texts]
    encoded = tokenizer.encode_with_offsets([text.encode() for text in beginnings], parse_special_tokens=False)
    notes = Counter[str](sampled=len(texts))
    for text, (tokens, _) in zip(beginnings, encoded, strict=True):
        back = tokenizer.decode(tokens).decode(errors="replace")
        notes["tokens"] += tokens.size
        notes["changed"] += back != text
        notes["beyond_spaces"] += "".join(back.split()) != "".join(text.split())
        notes["unknown"] += int(np.count_nonzero(tokens == tokenizer.unknown)) if tokenizer.unknown is not None else 0
    return notes


def _kind(document: Document) -> str:
    if document.chat:
        return "chat"
    return "text" if all(is_learnt for _, is_learnt in document.parts) else "pair"


def _mask(
    document: Document, offsets: Offsets, pieces: list[TokenArray], num_before: int, tokenizer: Tokenizer
) -> Mask:
    """Return the mask of a document; what is put around its text is learnt as what is next to it."""
    own = learnt_tokens(document, offsets, in_bytes=tokenizer.takes_any_bytes)
    sizes = [sum(piece.size for piece in around) for around in (pieces[:num_before], pieces[num_before + 1 :])]
    first, last = (np.full(size, document.parts[place][1]) for size, place in zip(sizes, (0, -1), strict=True))
    return np.concatenate([first, own, last], dtype=np.uint8, casting="unsafe")


def _ends_itself(document: Document, tokenizer: Tokenizer) -> bool:
    return bool(tokenizer.special_tokens) and document.text.decode().rstrip().endswith(tokenizer.special_tokens)
