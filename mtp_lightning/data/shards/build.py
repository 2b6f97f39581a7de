"""Build shards: documents in, tar shards with manifest and index out, all or nothing."""

import dataclasses
import functools
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from mtp_lightning.console.progress import Advance, say, watched
from mtp_lightning.data.shards.encode import (
    AS_NAMED,
    DIGEST_BYTES,
    FATES,
    Encoded,
    Own,
    Settings,
    cut_by_place,
    encode_blocks,
    split_of,
)
from mtp_lightning.data.shards.left_out import LeftOutCounts, remarks
from mtp_lightning.data.shards.manifest import (
    FORMAT_VERSION,
    SPLITS,
    Manifest,
    Shard,
    SourceCount,
    Split,
    describe,
    load_manifest,
)
from mtp_lightning.data.shards.staging import Counts, StagingFolder, commit, exclusive_build, is_built, say_others
from mtp_lightning.data.shards.tokenize import Mask
from mtp_lightning.data.shards.writer import MEMBER_TOKENS, SHARD_BYTES, SplitWriter
from mtp_lightning.data.text import blocks as units
from mtp_lightning.data.text.records import AS_KNOWN, Reading
from mtp_lightning.data.text.sources import SourceFile, find_files, spelled
from mtp_lightning.data.tokenizers.base import TokenArray, Tokenizer, token_dtype
from mtp_lightning.data.tokenizers.open import open_chat_template, open_tokenizer
from mtp_lightning.errors import DataError, refusal_of

BYTES_PER_PROCESS = 32 << 20


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How text becomes shards."""

    tokenizer: str = "byte"
    end_of_document: int | None = None  # the tokenizer's own unless given
    parse_special_tokens: bool = False
    add_special_tokens: bool = False
    chat_template: str | None = None  # the tokenizer's own unless given
    validation_fraction: float
    deduplicate: bool = False
    reading: Reading = AS_KNOWN
    member_tokens: int = MEMBER_TOKENS
    shard_bytes: int = SHARD_BYTES
    cuts_documents: bool = False  # held out is the last part of a document, for want of a second one


def build_shards(
    sources: list[str],
    out: Path,
    options: BuildOptions,
    *,
    processes: int | None = None,
    show_progress: bool = True,
) -> Manifest:
    """Tokenize the documents of all sources into the new folder `out`; equal documents give equal bytes.

    Neither the number of processes (None: as many as the corpus keeps busy) nor an interruption changes a byte. The
    folder appears under its name only when it is complete; until then, finished shards lie in `OUT.partial-*` and
    are taken over when the same build is started again. When the same folder is there already, or another process
    completes it first, that one is kept. Which documents are held out depends on their names alone, so it survives
    additions to the corpus. Where that would leave a split empty, the build is done again: with the lowest of several
    documents held out, or the last part of a single one.

    Raises:
        DataError: A source yields nothing, a document is malformed, a split stays empty, `out` is taken, or the
            disk fails.
    """
    passed_over = Counter[str]()
    files = find_files(sources, passed_over)
    tell: Callable[[str], None] = say if show_progress else lambda text: None
    build = functools.partial(_build, files, [Path(source).name for source in sources], out, processes=processes)
    try:
        manifest = build(options, tell=tell)
    except EmptySplitError as error:
        if error.other_options is None:
            raise
        tell(f"{error.found}; so {error.instead}")
        manifest = build(error.other_options, tell=tell)
    if passed_over:
        tell(f"passed over: {spelled(passed_over)}")
    return manifest


def _build(
    files: list[SourceFile],
    sources: list[str],
    out: Path,
    options: BuildOptions,
    *,
    processes: int | None,
    tell: Callable[[str], None],
) -> Manifest:
    """Build once, with what is held out decided."""
    is_built(out, listing_hash(files))
    tokenizer = open_tokenizer(
        options.tokenizer,
        end_of_document=options.end_of_document,
        parse_special_tokens=options.parse_special_tokens,
        add_special_tokens=options.add_special_tokens,
    )
    template = open_chat_template(options.tokenizer, options.chat_template)
    template_hash = template.fingerprint() if template else None
    began_at = time.monotonic()
    try:
        with exclusive_build(out, _identity(files, options, tokenizer, template_hash), tell) as folder:
            if folder is None:
                return load_manifest(out)
            say_others(out, folder, tell)
            staging = StagingFolder(folder)
            if staging.num_kept:
                tell(f"going on with {staging.num_kept:,} finished shards of a build that was ended")
            build = ShardBuild(staging, tokenizer, options, sources, template_hash)
            manifest = _run(build, files, out, processes=processes or _num_processes(files), show=tell is say)
    except OSError as error:
        hint = "See to space and rights there, or choose another folder; finished shards are kept"
        raise DataError(f"documents must be readable and {out} writable", refusal_of(error, out), hint) from error
    for line in remarks(build.notes, tokenizer.name, template):
        tell(line)
    tell(f"built {describe(manifest)} in {time.monotonic() - began_at:.1f} s: {out}")
    build.left_out.say(tell)
    return manifest


def _run(build: "ShardBuild", files: list[SourceFile], out: Path, *, processes: int, show: bool) -> Manifest:
    """Carry a build out; when it fails, keep its finished shards unless the documents are at fault."""
    is_kept = True
    try:
        with watched("building shards", total_bytes=_sum_bytes(files), show=show) as advance:
            build.add_files(files, processes, advance)
        manifest = build.close(files, listing_hash(files))
        commit(build.staging, out, manifest)
    except DataError:
        is_kept = False
        raise
    except BrokenProcessPool as error:
        raise DataError(
            "every process of a build must live to its end",
            "one that was ended, perhaps for want of memory",
            "Use fewer (--processes); finished shards are kept",
        ) from error
    finally:
        build.abandon(is_kept=is_kept)
    return manifest


def _num_processes(files: list[SourceFile]) -> int:
    """Return how many processes to use: no more than there are cores, nor than there is work."""
    return max(1, min(len(os.sched_getaffinity(0)), _sum_bytes(files) // BYTES_PER_PROCESS))


def _identity(files: list[SourceFile], options: BuildOptions, tokenizer: Tokenizer, template: str | None) -> str:
    """Return a hash of all that decides the shards, as far as it shows without reading the documents."""
    parts = {
        **dataclasses.asdict(options),
        "tokenizer": tokenizer.fingerprint(),
        "chat_template": template,
        "end_of_document": tokenizer.end_of_document,
        "format_version": FORMAT_VERSION,
        "unit_bytes": units.BLOCK_BYTES,  # the journal counts blocks
        "files": [[file.path.absolute().as_posix(), file.name, file.num_bytes, file.changed_at_ns] for file in files],
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def listing_hash(files: list[SourceFile]) -> str:
    """Return a hash over names and sizes, to notice cheaply that a corpus has changed."""
    return hashlib.sha256("\n".join(f"{file.name} {file.num_bytes}" for file in files).encode(*AS_NAMED)).hexdigest()


@final
class EmptySplitError(DataError):
    """Documents of which none would be trained on, or none held out."""

    other_options: BuildOptions | None = None  # with which both splits get some
    instead: str = ""  # what these do


@final
class ShardBuild:
    """One build on its way: a writer per split and what was counted so far."""

    def __init__(
        self,
        staging: StagingFolder,
        tokenizer: Tokenizer,
        options: BuildOptions,
        sources: list[str],
        template: str | None = None,
    ) -> None:
        self.staging = staging
        self.notes = Counter[str]()
        self._template = template  # fingerprint of the chat template
        self._tokenizer = tokenizer
        self._options = options
        self._writers = {split: self._writer(split) for split in SPLITS}
        self._counts: Counts = dict.fromkeys(SPLITS, 0)
        self._documents_of = [0] * len(sources)
        self._tokens_of = [0] * len(sources)
        self._sources = sources
        self._lowest_ranks: list[float] = []  # two at most, no two equal
        self.left_out = LeftOutCounts()
        self._seen: set[bytes] = set()

    def add_files(self, files: list[SourceFile], processes: int, advance: Advance) -> None:
        """Tokenize files and write their documents."""
        settings = Settings(
            tokenizer=self._options.tokenizer,
            tokenizer_hash=self._tokenizer.fingerprint(),
            end_of_document=self._options.end_of_document,
            parse_special_tokens=self._options.parse_special_tokens,
            add_special_tokens=self._options.add_special_tokens,
            chat_template=self._options.chat_template,
            template_hash=self._template,
            validation_fraction=self._options.validation_fraction,
            deduplicate=self._options.deduplicate,
            reading=self._options.reading,
        )
        known = (lambda number: frozenset()) if self._options.cuts_documents else self.staging.known
        blocks = units.cut_into_blocks(files, self._options.reading)
        stream = encode_blocks(blocks, settings, processes=processes, known=known)
        for number, encoded in enumerate(stream):
            self.add(encoded)
            self.staging.note_block(number, self._counts)
            advance(encoded.block.num_bytes)

    def close(self, files: Sequence[SourceFile], source_listing: str) -> Manifest:
        """Finish the last shards; describe all.

        Raises:
            EmptySplitError: There are no documents, or none in one split.
        """
        shards = {split: writer.close() for split, writer in self._writers.items()}
        self._refuse_empty(shards, len(files))
        return Manifest(
            dtype="uint16" if token_dtype(self._tokenizer.vocab_size).itemsize == 2 else "uint32",
            tokenizer=self._tokenizer.name,
            tokenizer_hash=self._tokenizer.fingerprint(),
            vocabulary=self._tokenizer.vocab_size,
            end_of_document=self._tokenizer.end_of_document,
            parse_special_tokens=self._options.parse_special_tokens or None,
            add_special_tokens=self._options.add_special_tokens or None,
            chat_template=self._template if self.notes["chats"] else None,
            largest_token=self.staging.largest_token,
            validation_share=self._options.validation_fraction,
            source_files=len(files),
            source_bytes=_sum_bytes(files),
            source_listing=source_listing,
            skipped_empty=self.left_out.fates["empty"],
            skipped_binary=sum(self.left_out.files.values()),
            skipped_not_utf8=self.left_out.fates["not_utf8"] or None,
            skipped_duplicates=self.left_out.fates["duplicate"] if self._options.deduplicate else None,
            skipped_rows=dict(self.left_out.rows) or None,
            sources=self._source_counts(),
            shards=shards["train"] + shards["validation"],
        )

    def abandon(self, *, is_kept: bool) -> None:
        """Let go of files that are still open, and of the folder if it was not given its name."""
        for writer in self._writers.values():
            writer.abandon()
        self.staging.abandon(is_kept=is_kept)

    def add(self, encoded: Encoded) -> None:
        """Write documents that are tokens."""
        self.notes += encoded.notes
        self.left_out.add(encoded.left_out)
        ends = np.cumsum(encoded.lengths)
        for number, fate in enumerate(encoded.fates):
            digest = encoded.digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
            if fate or self._is_duplicate(digest):
                self.left_out.fates[FATES[fate] if fate else "duplicate"] += 1
                continue
            rank = float(encoded.ranks[number])
            inside = slice(int(ends[number] - encoded.lengths[number]), int(ends[number]))
            mask = None if encoded.mask is None else encoded.mask[inside]
            if len(self._lowest_ranks) < 2 or rank < self._lowest_ranks[1]:
                self._lowest_ranks = sorted({*self._lowest_ranks, rank})[:2]
            for split, own, own_mask in self._splits(rank, encoded.tokens[inside], mask):
                self._documents_of[encoded.block.source] += 1
                self._tokens_of[encoded.block.source] += self._write(split, own, own_mask)

    def _splits(self, rank: float, tokens: TokenArray, mask: Mask | None) -> list[Own]:
        """Return what of a document goes into which split: all of it, unless documents are cut."""
        fraction = self._options.validation_fraction
        cut = cut_by_place(tokens, mask, fraction) if self._options.cuts_documents else None
        return cut or [(split_of(rank, fraction), tokens, mask)]

    def _write(self, split: Split, tokens: TokenArray, mask: Mask | None) -> int:
        """Write a document unless it lies in a shard that was kept, and return its number of tokens."""
        number = self._counts[split]
        self._counts[split] += 1
        kept = self.staging.kept_lengths[split]
        if number < kept.size:
            return int(kept[number])
        self._writers[split].add(tokens, mask)
        return tokens.size

    def _is_duplicate(self, digest: bytes) -> bool:
        if not digest:
            return False
        is_seen = digest in self._seen
        self._seen.add(digest)
        return is_seen

    def _writer(self, split: Split) -> SplitWriter:
        return SplitWriter(
            self.staging.path,
            split,
            member_tokens=self._options.member_tokens,
            shard_bytes=self._options.shard_bytes,
            kept=self.staging.kept[split],
            on_shard=self.staging.note_shard,
        )

    def _source_counts(self) -> list[SourceCount] | None:
        counts = zip(self._sources, self._documents_of, self._tokens_of, strict=True)
        if len(self._sources) == 1:
            return None
        return [SourceCount(name=name, num_documents=own, num_tokens=tokens) for name, own, tokens in counts]

    def _refuse_empty(self, shards: dict[Split, list[Shard]], num_files: int) -> None:
        num_documents = sum(self._counts.values())
        if num_documents == self.left_out.json_as_text.total():
            raise EmptySplitError(
                "a corpus must hold at least one document with text",
                self.left_out.found(num_files),
                self.left_out.hint(),
            )
        if self.notes["sampled"] and not self.notes["tokens"]:
            raise EmptySplitError(
                "a tokenizer must know some of the text",
                f"no token for any of {self.notes['sampled']:,} documents sampled, by {self._tokenizer.name}",
                "Choose another tokenizer (data.tokenizer, --tokenizer)",
            )
        for split, written in shards.items():
            if not written:
                raise self._empty_split(split, num_documents)

    def _empty_split(self, split: Split, num_documents: int) -> EmptySplitError:
        """Return the error that a split has no documents, with the options that give it some."""
        options, ranks = self._options, self._lowest_ranks
        found = f"none of {num_documents:,} for {split} at data.validation_fraction={options.validation_fraction}"
        error = EmptySplitError("both splits must get at least one document", found, _share_remedy(ranks))
        if len(ranks) == 1:
            error.other_options = dataclasses.replace(options, cuts_documents=True)
            error.instead = "the last part of each is held out" if num_documents > 1 else "its last part is held out"
        else:
            error.other_options = dataclasses.replace(options, validation_fraction=sum(ranks) / 2)
            error.instead = f"1 is held out, as by data.validation_fraction={sum(ranks) / 2:.3g}"
        return error


def _share_remedy(ranks: list[float]) -> str:
    if len(ranks) == 1:
        return "Add documents (JSONL has one per line)"
    share = f"{sum(ranks) / 2:.3g}"
    return (
        f"Set data.validation_fraction={share}, which holds out one of them (--validation-fraction), or add documents"
    )


def _sum_bytes(files: Sequence[SourceFile]) -> int:
    return sum(file.num_bytes for file in files)
