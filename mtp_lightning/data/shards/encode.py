"""From blocks of documents to token ids, in as many processes as there are; results come in the order of the blocks."""

import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtp_lightning.data.shards.manifest import Split
from mtp_lightning.data.text.blocks import DocumentBlock
from mtp_lightning.data.text.records import AS_KNOWN, Document, LeftOut, Reading
from mtp_lightning.data.tokenizers.base import TokenArray, Tokenizer, token_dtype
from mtp_lightning.data.tokenizers.open import open_tokenizer

FATES = ("kept", "empty", "not_utf8")
DIGEST_BYTES = 16
AS_NAMED = ("utf-8", "surrogateescape")  # file names need not be UTF-8

Own = tuple[Split, TokenArray, NDArray[np.uint8] | None]
"""What of a document goes into a split: tokens and mask."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the tokens of a document besides its text."""

    tokenizer: str
    end_of_document: int | None
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
    mask: NDArray[np.uint8] | None  # per token, 1 where it is learnt; None where all are
    digests: bytes  # of `DIGEST_BYTES` each; empty unless asked for
    left_out: tuple[LeftOut, ...] = ()


def encode_blocks(
    blocks: Iterable[DocumentBlock], settings: Settings, *, processes: int, known: Callable[[int], frozenset[Split]]
) -> Iterator[Encoded]:
    """Yield what each block holds, in order; `known` names the splits of a block whose tokens are not needed.

    At most two blocks per process are held at a time.

    Raises:
        DataError: A document is malformed.
        BrokenProcessPool: A process was ended.
    """
    tasks = ((block, settings, known(number)) for number, block in enumerate(blocks))
    if processes == 1:
        yield from itertools.starmap(_encode_block, tasks)
        return
    waiting: deque[Future[Encoded]] = deque()
    with _pool(processes) as pool:
        for task in tasks:
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
    tokenizer = _tokenizer(settings.tokenizer, settings.end_of_document)
    fates, ranks, digests = [], [], []
    wanted: list[Document | None] = []
    left_out: list[LeftOut] = []
    for document in block.documents(settings.reading):
        if isinstance(document, LeftOut):
            left_out.append(document)
            continue
        fates.append(FATES.index(_fate(document, tokenizer)))
        ranks.append(held_out_rank(document.name))
        digests.append(_digest(document) if settings.deduplicate else b"")
        is_wanted = fates[-1] == 0 and split_of(ranks[-1], settings.validation_fraction) not in known
        wanted.append(document if is_wanted else None)
    lengths, tokens, mask = _encode_documents(wanted, tokenizer)
    return Encoded(
        block=DocumentBlock(source=block.source, num_bytes=block.num_bytes, files=()),  # its lines need not travel back
        fates=np.array(fates, dtype=np.uint8),
        ranks=np.array(ranks, dtype=np.float64),
        lengths=lengths,
        tokens=tokens,
        mask=mask,
        digests=b"".join(digests),
        left_out=tuple(left_out),
    )


def _encode_documents(
    documents: list[Document | None], tokenizer: Tokenizer
) -> tuple[NDArray[np.int64], TokenArray, NDArray[np.uint8] | None]:
    """Return lengths, tokens with end-of-document after each document, and the mask if some part is only read."""
    dtype = token_dtype(tokenizer.vocab_size)
    end = np.array([tokenizer.end_of_document], dtype=dtype)
    parts = [part for document in documents if document for part in document.parts]
    encoded = iter(tokenizer.encode_many([text for text, _ in parts]))
    pieces: list[TokenArray] = []
    learnt: list[bool] = []
    lengths = np.zeros(len(documents), dtype=np.int64)
    for number, document in enumerate(documents):
        if document:
            own = [*itertools.islice(encoded, len(document.parts)), end]
            flags = [is_learnt for _, is_learnt in document.parts]
            pieces += own
            learnt += [*flags, flags[-1]]  # the end belongs to what is before it
            lengths[number] = sum(piece.size for piece in own)
    tokens = np.concatenate([np.array([], dtype=dtype), *pieces], dtype=dtype)
    if all(learnt):
        return lengths, tokens, None
    return lengths, tokens, np.repeat(np.array(learnt, dtype=np.uint8), [piece.size for piece in pieces])


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
def _tokenizer(spec: str, end_of_document: int | None) -> Tokenizer:
    return open_tokenizer(spec, end_of_document=end_of_document)


@contextmanager
def _pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    context: Any = multiprocessing.get_context("spawn")  # a fork would copy running threads
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_begin_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


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
