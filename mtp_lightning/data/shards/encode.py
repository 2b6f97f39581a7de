"""From blocks of documents to token ids, in as many processes as there are; results come in the order of the blocks."""

import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_lightning.data.shards.manifest import Split
from mtp_lightning.data.shards.render import render_chat
from mtp_lightning.data.shards.tokenize import Mask, encode_documents, round_trip
from mtp_lightning.data.text.blocks import DocumentBlock
from mtp_lightning.data.text.records import AS_KNOWN, Chat, Document, LeftOut, Reading
from mtp_lightning.data.tokenizers.base import TokenArray, Tokenizer, token_dtype
from mtp_lightning.data.tokenizers.chat import ChatTemplate
from mtp_lightning.data.tokenizers.open import open_chat_template, open_tokenizer
from mtp_lightning.errors import DataError, LaunchError

FATES = ("kept", "empty", "not_utf8")
DIGEST_BYTES = 16
SAMPLED = 8  # documents of a block whose text is decoded again
AS_NAMED = ("utf-8", "surrogateescape")  # file names need not be UTF-8

Own = tuple[Split, TokenArray, NDArray[np.uint8] | None]
"""What of a document goes into a split: tokens and mask."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the tokens of a document besides its text."""

    tokenizer: str
    tokenizer_hash: str
    end_of_document: int | None
    parse_special_tokens: bool
    add_special_tokens: bool
    chat_template: str | None
    template_hash: str | None
    validation_fraction: float
    deduplicate: bool
    reading: Reading = AS_KNOWN


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The documents of a block as flat arrays, one entry per document."""

    block: DocumentBlock
    fates: NDArray[np.uint8]  # index into FATES
    ranks: NDArray[np.float64]  # low ones are held out
    lengths: NDArray[np.int64]  # 0 where the tokens were not asked for, or the document is left out
    tokens: TokenArray
    mask: Mask | None  # per token, 1 where it is learnt; None where all are
    digests: bytes  # of `DIGEST_BYTES` each; empty unless asked for
    notes: Counter[str]  # how chats were rendered, and what became of a sample of texts
    left_out: tuple[LeftOut, ...] = ()


def encode_blocks(
    blocks: Iterable[DocumentBlock], settings: Settings, *, processes: int, known: Callable[[int], frozenset[Split]]
) -> Iterator[Encoded]:
    """Yield what each block holds, in order; `known` names the splits of a block whose tokens are not needed.

    At most two blocks per process are held at a time.

    Raises:
        DataError: A document is malformed.
        BrokenProcessPool: A process was ended.
        LaunchError: None can be started.
    """
    tasks = ((block, settings, known(number)) for number, block in enumerate(blocks))
    if processes == 1:
        yield from itertools.starmap(_encode_block, tasks)
        return
    waiting: deque[Future[Encoded]] = deque()
    with _pool(processes) as pool:
        for task in tasks:
            with _told_if_none_starts():
                waiting.append(pool.submit(_encode_block, *task))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def held_out_rank(name: str) -> float:
    """Return a number in [0, 1) that depends on a document's name only; low ones are held out first."""
    return int.from_bytes(hashlib.sha256(name.encode(*AS_NAMED)).digest()[:6], "big") / 2**48


def split_of(rank: float, validation_fraction: float) -> Split:
    """Return the split that a document of this rank is in."""
    return "validation" if rank < validation_fraction else "train"


def cut_by_place(tokens: TokenArray, mask: NDArray[np.uint8] | None, validation_fraction: float) -> list[Own] | None:
    """Cut a document so that its last learnt tokens are held out; None if it has but one. Both parts have its end."""
    learnt = np.arange(tokens.size) if mask is None else np.flatnonzero(mask)
    if learnt.size < 3:  # one of them is the end
        return None
    place = round(learnt.size * (1 - validation_fraction))
    cut = int(learnt[min(max(place, 1), learnt.size - 2)])
    masks = (None, None) if mask is None else (np.append(mask[:cut], mask[-1:]), mask[cut:])
    return [("train", np.append(tokens[:cut], tokens[-1:]), masks[0]), ("validation", tokens[cut:], masks[1])]


def _encode_block(block: DocumentBlock, settings: Settings, known: frozenset[Split]) -> Encoded:
    tokenizer, template = _opened(settings)
    fates, ranks, digests = [], [], []
    wanted: list[Document | None] = []
    notes: Counter[str] = Counter()
    left_out: list[LeftOut] = []
    for document in block.documents(settings.reading):
        if isinstance(document, Document) and document.chat:
            document = _rendered(document, document.chat, template, notes, skips=settings.reading.skips)
        if isinstance(document, LeftOut):
            left_out.append(document)
            continue
        fates.append(FATES.index(_fate(document, tokenizer)))
        ranks.append(held_out_rank(document.name))
        digests.append(_digest(document) if settings.deduplicate else b"")
        is_wanted = fates[-1] == 0 and split_of(ranks[-1], settings.validation_fraction) not in known
        wanted.append(document if is_wanted else None)
    documents = [document for document in wanted if document]
    if not tokenizer.takes_any_bytes:
        notes += round_trip([document.text for document in documents[:SAMPLED]], tokenizer)
    parses_chats = template is None or template.writes_special_tokens
    encoded = list(encode_documents(documents, tokenizer, parses_chats=parses_chats))
    sizes = [sum([piece.size for piece in pieces]) for pieces, _ in encoded]
    lengths = np.zeros(len(wanted), dtype=np.int64)
    lengths[[document is not None for document in wanted]] = sizes
    dtype = token_dtype(tokenizer.vocab_size)
    tokens = itertools.chain.from_iterable(pieces for pieces, _ in encoded)
    return Encoded(
        block=DocumentBlock(source=block.source, num_bytes=block.num_bytes, files=()),  # its lines need not travel back
        fates=np.array(fates, dtype=np.uint8),
        ranks=np.array(ranks, dtype=np.float64),
        lengths=lengths,
        tokens=np.concatenate([np.array([], dtype=dtype), *tokens], dtype=dtype),
        mask=_joined(sizes, [mask for _, mask in encoded]),
        digests=b"".join(digests),
        notes=notes,
        left_out=tuple(left_out),
    )


def _rendered(
    document: Document, chat: Chat, template: ChatTemplate | None, notes: Counter[str], *, skips: bool
) -> Document | LeftOut:
    """Render a chat, and count it; one that the template does not take is left out if such are.

    Raises:
        DataError: There is no template, or it does not take the chat; the error names the document.
    """
    if template is None:
        raise DataError(
            "chats need a chat template, and the tokenizer has none",
            f"{document.name}, a list of turns",
            "Give one: data.chat_template=FILE.jinja (--chat-template), or `plain` for roles as plain text",
        )
    try:
        rendered = render_chat(chat, template)
    except DataError as error:
        if skips:
            return LeftOut(place=document.name, kind="chat that the template does not take", found=error.found)
        raise DataError(error.expected, f"{document.name}: {error.found}", error.hint) from error
    notes.update(chats=1, turns=rendered.num_turns, unlearnt=rendered.num_unlearnt)
    return replace(document, parts=rendered.parts)


def _joined(sizes: list[int], masks: list[Mask | None]) -> Mask | None:
    if all(mask is None for mask in masks):
        return None
    whole = (np.ones(size, dtype=np.uint8) if mask is None else mask for size, mask in zip(sizes, masks, strict=True))
    return np.concatenate(list(whole))


def _fate(document: Document, tokenizer: Tokenizer) -> str:
    if document.is_empty:
        return "empty"
    return "kept" if tokenizer.takes_any_bytes or _is_utf8(document) else "not_utf8"


def _is_utf8(document: Document) -> bool:
    try:
        for text, _ in document.parts:
            text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _digest(document: Document) -> bytes:
    """Return a hash of what is said and learnt: 128 bits, so that equal ones mean equal documents."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for text, is_learnt in document.parts:
        digest.update(b"%d %d:" % (is_learnt, len(text)))
        digest.update(text)
    return digest.digest()


@lru_cache(maxsize=1)
def _opened(settings: Settings) -> tuple[Tokenizer, ChatTemplate | None]:
    tokenizer = open_tokenizer(
        settings.tokenizer,
        end_of_document=settings.end_of_document,
        parse_special_tokens=settings.parse_special_tokens,
        add_special_tokens=settings.add_special_tokens,
    )
    template = open_chat_template(settings.tokenizer, settings.chat_template)
    hashes = tokenizer.fingerprint(), None if template is None else template.fingerprint()
    if hashes != (settings.tokenizer_hash, settings.template_hash):
        raise DataError(
            "tokenizer and chat template must stay as they are while shards are built",
            f"other contents of {settings.tokenizer} than when the build began",
            "Build again, when nothing writes there",
        )
    return tokenizer, template


@contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    context: Any = multiprocessing.get_context("spawn")  # a fork would copy running threads
    with _told_if_none_starts():
        pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _told_if_none_starts() -> Iterator[None]:
    """Tell a refusal to start processes, or the semaphores and pipes between them, from one of the documents' files."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # "can't start new thread" is the second, and so is a pool that broke
        if isinstance(error, BrokenProcessPool):
            raise
        raise LaunchError(
            "processes that encode documents must be able to start",
            str(error),
            "Build with one (--processes 1), or see to what limits them: ulimit -u, ulimit -n, room in /dev/shm",
        ) from error


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, one core to each worker, and no worker behind when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
