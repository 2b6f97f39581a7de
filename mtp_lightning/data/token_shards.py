"""Documents that are tokens already: the beginnings of those in shards, and shards of others."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mtp_lightning.data.build import commit
from mtp_lightning.data.encoding import split_of
from mtp_lightning.data.manifest import MANIFEST_NAME, SPLITS, Manifest, Shard, Split
from mtp_lightning.data.mapped import ShardMaps
from mtp_lightning.data.partial import Partial, claimed
from mtp_lightning.data.progress import say
from mtp_lightning.data.shard_writer import MEMBER_TOKENS, SHARD_BYTES, SplitWriter
from mtp_lightning.data.tokenizers import Tokenizer, token_dtype
from mtp_lightning.errors import DataError


class TokenDocument(NamedTuple):
    """A document, its end included."""

    tokens: list[int]
    is_learnt: list[bool]  # for each token, whether it may be a target
    rank: float  # low ones are held out


@dataclass(frozen=True, kw_only=True)
class TokenShards:
    """What shards of tokens are made with."""

    tokenizer: Tokenizer
    source: str  # in words; with `tokenizer` and `validation_share` it tells one set of documents from another
    validation_share: float


def beginnings(folder: Path, num_tokens: int) -> Iterator[list[int]]:
    """Yield the first tokens of every training document in a folder of shards that is longer than that.

    Raises:
        DataError: The folder holds no shards, or they are damaged.
    """
    maps = ShardMaps(folder, "train")
    for place in range(len(maps.shards)):
        starts, lengths = maps[place].document_places()
        for start in starts[lengths > num_tokens + 1]:
            yield maps[place].tokens(np.array([start]), num_tokens)[0].tolist()


def write_token_shards(documents: Iterable[TokenDocument], out: Path, made: TokenShards) -> Manifest:
    """Write documents into the new folder `out`, which appears when it is complete.

    Raises:
        DataError: `out` is taken, a split stays empty, or the disk fails.
    """
    check_new(out)
    identity = hashlib.sha256(json.dumps([made.source, made.validation_share, out.name]).encode()).hexdigest()
    try:
        with claimed(out, identity, say) as folder:
            if folder is None:
                raise _taken(out)
            partial = Partial(folder)
            writers: dict[Split, SplitWriter] = {split: _writer(partial, split) for split in SPLITS}
            is_complete = False
            try:
                _add(documents, writers, made)
                shards = {split: writer.close() for split, writer in writers.items()}
                manifest = _manifest_of(shards, partial, made)
                commit(partial, out, manifest)
                is_complete = True
            finally:
                if not is_complete:
                    for writer in writers.values():
                        writer.abandon()
                    partial.abandon(is_kept=False)
    except OSError as error:
        raise DataError(f"{out} must be writable", str(error), "See to space and rights there") from error
    return manifest


def check_new(out: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        DataError: It does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise _taken(out)


def _writer(partial: Partial, split: Split) -> SplitWriter:
    return SplitWriter(
        partial.path, split, member_tokens=MEMBER_TOKENS, shard_bytes=SHARD_BYTES, on_shard=partial.note_shard
    )


def _add(documents: Iterable[TokenDocument], writers: dict[Split, SplitWriter], made: TokenShards) -> None:
    dtype = token_dtype(made.tokenizer.vocabulary)
    for document in documents:
        mask = None if all(document.is_learnt) else np.array(document.is_learnt, dtype=np.uint8)
        split = split_of(document.rank, made.validation_share)
        writers[split].add(np.array(document.tokens, dtype=dtype), mask)


def _manifest_of(shards: dict[Split, list[Shard]], partial: Partial, made: TokenShards) -> Manifest:
    tokenizer = made.tokenizer
    for split, written in shards.items():
        if not written:
            raise DataError(
                "both splits must get at least one document",
                f"none for {split} at a share of {made.validation_share} held out",
                "Make more documents from more prompts, or change --validation-share",
            )
    return Manifest(
        dtype="uint16" if token_dtype(tokenizer.vocabulary).itemsize == 2 else "uint32",
        tokenizer=tokenizer.name,
        tokenizer_hash=tokenizer.fingerprint(),
        vocabulary=tokenizer.vocabulary,
        end_of_document=tokenizer.end_of_document,
        largest_token=partial.largest_token,
        validation_share=made.validation_share,
        source_files=0,
        source_bytes=0,
        source_listing=hashlib.sha256(made.source.encode()).hexdigest(),
        skipped_empty=0,
        skipped_binary=0,
        shards=shards["train"] + shards["validation"],
    )


def _taken(out: Path) -> DataError:
    what = "shards" if (out / MANIFEST_NAME).exists() else "something"
    return DataError("the folder for shards must be new or empty", f"{what} in {out}", "Give another --out")
