"""Documents that are tokens already: the beginnings of those in shards, and shards of others."""

import hashlib
import json
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

import numpy as np

from mtp_lightning.console.progress import say
from mtp_lightning.data.generated.half_written import Setting, check_request, take_up
from mtp_lightning.data.generated.log import TextLog
from mtp_lightning.data.shards.build import commit
from mtp_lightning.data.shards.encode import split_of
from mtp_lightning.data.shards.manifest import MANIFEST_NAME, SPLITS, Manifest, Shard, Split, load_manifest
from mtp_lightning.data.shards.mapped import ShardMaps
from mtp_lightning.data.shards.staging import Partial, claimed, say_others
from mtp_lightning.data.shards.writer import MEMBER_TOKENS, SHARD_BYTES, SplitWriter
from mtp_lightning.data.tokenizers.base import Tokenizer, token_dtype
from mtp_lightning.errors import DataError

HALF_WRITTEN = "texts"  # OUT.partial-texts
TEXTS_NAME = "texts.log"
SHARDS_NAME = "shards"


class TokenDocument(NamedTuple):
    """A document, its end included."""

    tokens: list[int]
    is_learnt: list[bool]  # for each token, whether it may be a target
    rank: float  # low ones are held out


WriteTexts = Callable[[TextLog], Generator[TokenDocument, None, None]]


@final
class _EmptySplitError(DataError):
    """Documents that can never be made shards of."""


@dataclass(frozen=True, kw_only=True)
class TokenShards:
    """What shards of tokens are made with."""

    tokenizer: Tokenizer
    request: Mapping[str, Setting]  # all else that decides the documents, by the names that a user knows
    validation_fraction: float

    @property
    def settings(self) -> dict[str, Setting]:
        """All that decides the shards, by name."""
        tokenizer = f"{self.tokenizer.name} {self.tokenizer.fingerprint()[:16]}, end {self.tokenizer.end_of_document}"
        return {**self.request, "--validation-fraction": self.validation_fraction, "tokenizer": tokenizer}

    @property
    def listing(self) -> str:
        """A hash of all that decides the shards."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()


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


def write_token_shards(write: WriteTexts, out: Path, made: TokenShards) -> Manifest | None:
    """Write documents into the new folder `out`, which appears when it is complete; None if they are there already.

    `write` gives the documents, in an order that is always the same. It is handed the texts that an equal build had
    written before it was ended, gives their documents again and adds to them. The shards are made anew from them, so
    that they are, to the byte, those of a build that was never ended.

    Raises:
        DataError: `out` is taken, half of it was written for another request, a split stays empty, or the disk fails.
    """
    _refuse_taken(out, made)
    try:
        with claimed(out, HALF_WRITTEN, say) as folder:
            _refuse_taken(out, made)
            if folder is None:
                return None
            manifest = None if (out / MANIFEST_NAME).exists() else _write(write, folder, out, made)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        hint = "See to space and rights there; the same command goes on with the texts that are written"
        raise DataError(f"{out} must be writable", str(error), hint) from error
    return manifest


def _write(write: WriteTexts, folder: Path, out: Path, made: TokenShards) -> Manifest:
    """Take up what is written, and go on to the end; when that fails, keep the texts, unless they are at fault."""
    say_others(out, folder)
    take_up(folder, made.settings)
    with TextLog(folder / TEXTS_NAME) as log:
        if log.num_texts:
            say(f"going on after {log.num_texts:,} texts of a build that was ended")
        try:
            return _write_shards(write, log, out, made, folder / SHARDS_NAME)
        except BaseException as error:
            if log.num_texts and not isinstance(error, _EmptySplitError):
                say(f"{log.num_texts:,} texts are kept in {folder}: the same command goes on with them", stderr=True)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _write_shards(write: WriteTexts, log: TextLog, out: Path, made: TokenShards, folder: Path) -> Manifest:
    """Make shards in `folder` and give it its name."""
    shutil.rmtree(folder, ignore_errors=True)  # the texts, not these, say how far a build was
    folder.mkdir()
    partial = Partial(folder)
    writers: dict[Split, SplitWriter] = {split: _writer(partial, split) for split in SPLITS}
    try:
        with closing(write(log)) as documents:
            _add(documents, writers, made)
        manifest = _manifest_of({split: writer.close() for split, writer in writers.items()}, partial, made)
        commit(partial, out, manifest)
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        partial.abandon(is_kept=False)
        raise
    return manifest


def _refuse_taken(out: Path, made: TokenShards) -> None:
    """Refuse a folder that holds something else than these very shards, or half of others."""
    check_request(out.with_name(f"{out.name}.partial-{HALF_WRITTEN}"), made.settings)
    if (out / MANIFEST_NAME).exists() and load_manifest(out).source_listing == made.listing:
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "other shards" if (out / MANIFEST_NAME).exists() else "something"
        raise DataError("the folder for shards must be new or empty", f"{what} in {out}", "Give another --out")


def _writer(partial: Partial, split: Split) -> SplitWriter:
    return SplitWriter(
        partial.path, split, member_tokens=MEMBER_TOKENS, shard_bytes=SHARD_BYTES, on_shard=partial.note_shard
    )


def _add(documents: Iterable[TokenDocument], writers: dict[Split, SplitWriter], made: TokenShards) -> None:
    dtype = token_dtype(made.tokenizer.vocab_size)
    for document in documents:
        mask = None if all(document.is_learnt) else np.array(document.is_learnt, dtype=np.uint8)
        split = split_of(document.rank, made.validation_fraction)
        writers[split].add(np.array(document.tokens, dtype=dtype), mask)


def _manifest_of(shards: dict[Split, list[Shard]], partial: Partial, made: TokenShards) -> Manifest:
    tokenizer = made.tokenizer
    for split, written in shards.items():
        if not written:
            raise _EmptySplitError(
                "both splits must get at least one document",
                f"none for {split} at a share of {made.validation_fraction} held out",
                "Make more documents from more prompts, or change --validation-fraction",
            )
    return Manifest(
        dtype="uint16" if token_dtype(tokenizer.vocab_size).itemsize == 2 else "uint32",
        tokenizer=tokenizer.name,
        tokenizer_hash=tokenizer.fingerprint(),
        vocabulary=tokenizer.vocab_size,
        end_of_document=tokenizer.end_of_document,
        largest_token=partial.largest_token,
        validation_fraction=made.validation_fraction,
        source_files=0,
        source_bytes=0,
        source_listing=made.listing,
        skipped_empty=0,
        skipped_binary=0,
        shards=shards["train"] + shards["validation"],
    )
