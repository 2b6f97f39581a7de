"""From the parts of documents to token ids and loss masks."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_lightning.data.text.documents import Document
from mtp_lightning.data.tokenizers.base import Offsets, TokenArray, Tokenizer

Mask = NDArray[np.uint8]
"""Per token, 1 where it is learnt."""
NOTHING: tuple[TokenArray, Mask | None] = (np.array([], dtype=np.uint16), None)
SAMPLED_BYTES = 2048


def encode_documents(
    documents: Sequence[Document], tokenizer: Tokenizer, *, parses_chats: bool
) -> list[tuple[TokenArray, Mask | None]]:
    """Return the ids of each document, its end included, and its mask if a part of it is only read.

    A document is one text to the tokenizer, whatever its parts. A token is learnt if some of its characters are, so
    one that crosses a border is. An end is added unless the text has it: as its last id or, in a chat, as the special
    token that the template wrote last, white space aside.

    Args:
        documents: with UTF-8 parts, unless the tokenizer takes any bytes.
        tokenizer: says whether special tokens in texts are parsed, and what is added around them.
        parses_chats: whether special tokens are parsed in chats.
    """
    plain = iter(tokenizer.encode_many([document.text for document in documents if _is_whole(document)]))
    parsed: dict[bool, list[Document]] = {}
    for document in documents:
        if not _is_whole(document):
            parses = parses_chats if document.chat else tokenizer.parses_special_tokens
            parsed.setdefault(parses, []).append(document)
    marked: dict[int, tuple[TokenArray, Offsets]] = {}
    for parses, own in parsed.items():
        found = tokenizer.encode_with_offsets([document.text for document in own], parse_special_tokens=parses)
        marked |= zip(map(id, own), found, strict=True)
    encoded = []
    for document in documents:
        tokens, offsets = marked.get(id(document)) or (next(plain), None)
        mask = None if offsets is None else learnt_tokens(document, offsets, in_bytes=tokenizer.takes_any_bytes)
        encoded.append(_framed(document, tokens, mask, tokenizer))
    return encoded


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
    pairs = tokenizer.encode_with_offsets([text.encode() for text in beginnings], parse_special_tokens=False)
    encoded = [tokens for tokens, _ in pairs]
    notes = Counter[str](sampled=len(texts), tokens=sum(tokens.size for tokens in encoded))
    for text, tokens in zip(beginnings, encoded, strict=True):
        back = tokenizer.decode(tokens).decode(errors="replace")
        notes["changed"] += back != text
        notes["beyond_spaces"] += "".join(back.split()) != "".join(text.split())
        notes["unknown"] += int(np.count_nonzero(tokens == tokenizer.unknown)) if tokenizer.unknown is not None else 0
    return notes


def _is_whole(document: Document) -> bool:
    """Tell whether all of a text is learnt."""
    return not document.chat and all(is_learnt for _, is_learnt in document.parts)


def _framed(
    document: Document, tokens: TokenArray, mask: Mask | None, tokenizer: Tokenizer
) -> tuple[TokenArray, Mask | None]:
    """Put around the ids of a text what belongs there; it is learnt as what is next to it."""
    opening, closing = ((), ()) if document.chat else (tokenizer.opening, tokenizer.closing)
    has_end = tokens[-1:].tolist() == [tokenizer.end_of_document]
    if not has_end and not (document.chat and _ends_itself(document, tokenizer)):
        closing = (*closing, tokenizer.end_of_document)
    framed: Any = np.concatenate([np.array(opening, dtype=np.uint32), tokens, np.array(closing, dtype=np.uint32)])
    if mask is not None:
        first, last = (int(document.parts[place][1]) for place in (0, -1))
        mask = np.concatenate([np.full(len(opening), first), mask, np.full(len(closing), last)]).astype(np.uint8)
    return framed, mask


def _ends_itself(document: Document, tokenizer: Tokenizer) -> bool:
    return bool(tokenizer.special_tokens) and document.text.decode().rstrip().endswith(tokenizer.special_tokens)
