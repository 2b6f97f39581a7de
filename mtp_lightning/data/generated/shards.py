"""Documents that are tokens already: the beginnings of those in shards, and shards of others."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtp_lightning.console.progress import say
from mtp_lightning.data.generated.log import LOG_NAME, Setting, TextLog, check_request
from mtp_lightning.data.shards.build import BuildOptions, EmptySplitError, ShardBuild
from mtp_lightning.data.shards.encode import Encoded
from mtp_lightning.data.shards.manifest import Manifest
from mtp_lightning.data.shards.mapped import ShardMaps
from mtp_lightning.data.shards.staging import StagingFolder, commit, exclusive_build, is_built, say_others
from mtp_lightning.data.shards.writer import MEMBER_TOKENS, SHARD_BYTES
from mtp_lightning.data.text.blocks import DocumentBlock
from mtp_lightning.data.tokenizers.base import Tokenizer, token_dtype
from mtp_lightning.errors import DataError, refusal_of
from mtp_lightning.files.atomic_folder import check_staging, make_empty, staging_path

IDENTITY = "texts"  # OUT.partial-texts
SHARDS_NAME = "shards"


class TokenDocument(NamedTuple):
    """A document, its end included."""

    tokens: list[int]
    is_learnt: list[bool]  # for each token, whether it may be a target
    rank: float  # low ones are held out


WriteTexts = Callable[[TextLog], Generator[TokenDocument, None, None]]


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
    check_staging(staging_path(out, IDENTITY), (LOG_NAME, SHARDS_NAME), DataError)
    check_request(staging_path(out, IDENTITY), made.settings)
    is_built(out, made.listing)
    try:
        with exclusive_build(out, IDENTITY, say) as folder:
            if folder is None:
                return None
            manifest = None if is_built(out, made.listing) else _write(write, folder, out, made)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        hint = "See to space and rights there; the same command goes on with the texts that are written"
        raise DataError(f"{out} must be writable", refusal_of(error, out), hint) from error
    return manifest


def _write(write: WriteTexts, folder: Path, out: Path, made: TokenShards) -> Manifest:
    """Take up what is written, and go on to the end; when that fails, keep the texts, unless they are at fault."""
    say_others(out, folder)
    with TextLog(folder, made.settings) as log:
        if log.num_texts:
            say(f"going on after {log.num_texts:,} texts of a build that was ended")
        try:
            return _write_shards(write, log, out, made, folder / SHARDS_NAME)
        except BaseException as error:
            if log.num_texts and not isinstance(error, EmptySplitError):
                say(f"{log.num_texts:,} texts are kept in {folder}: the same command goes on with them", stderr=True)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _write_shards(write: WriteTexts, log: TextLog, out: Path, made: TokenShards, folder: Path) -> Manifest:
    """Make shards in `folder` and give it its name."""
    make_empty(folder)  # the texts, not the shards, say how far a build was
    options = BuildOptions(
        validation_fraction=made.validation_fraction, member_tokens=MEMBER_TOKENS, shard_bytes=SHARD_BYTES
    )
    build = ShardBuild(StagingFolder(folder), made.tokenizer, options, [IDENTITY])
    try:
        with closing(write(log)) as documents:
            for document in documents:
                build.add(_encoded(document, token_dtype(made.tokenizer.vocab_size)))
        manifest = build.close((), made.listing)
        commit(build.staging, out, manifest)
    finally:
        build.abandon(is_kept=False)
    return manifest


def _encoded(document: TokenDocument, dtype: np.dtype[Any]) -> Encoded:
    return Encoded(
        block=DocumentBlock(source=0, num_bytes=0, files=()),
        fates=np.zeros(1, dtype=np.uint8),
        ranks=np.array([document.rank]),
        lengths=np.array([len(document.tokens)]),
        tokens=np.array(document.tokens, dtype=dtype),
        mask=None if all(document.is_learnt) else np.array(document.is_learnt, dtype=np.uint8),
        digests=b"",
        notes=Counter(),
    )
