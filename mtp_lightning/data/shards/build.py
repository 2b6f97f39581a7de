"""Build shards: documents in, tar shards with manifest and index out, all or nothing."""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from mtp_lightning.console.progress import Advance, say, watched
from mtp_lightning.data.shards.encode import AS_NAMED, DIGEST_BYTES, FATES, Encoded, Settings, encode_blocks, split_of
from mtp_lightning.data.shards.index import write_index
from mtp_lightning.data.shards.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    SPLITS,
    Manifest,
    Shard,
    SourceCount,
    Split,
    load_manifest,
    manifest_text,
)
from mtp_lightning.data.shards.remarks import remarks
from mtp_lightning.data.shards.staging import Counts, StagingFolder, exclusive_build, say_others
from mtp_lightning.data.shards.tokenize import Mask
from mtp_lightning.data.shards.writer import MEMBER_TOKENS, SHARD_BYTES, SplitWriter
from mtp_lightning.data.text import blocks as units
from mtp_lightning.data.text.sources import SourceFile, find_files
from mtp_lightning.data.tokenizers.base import TokenArray, Tokenizer, token_dtype
from mtp_lightning.data.tokenizers.open import open_chat_template, open_tokenizer
from mtp_lightning.errors import DataError
from mtp_lightning.files.atomic_folder import check_new_folder, publish
from mtp_lightning.files.durable import sync

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
    member_tokens: int = MEMBER_TOKENS
    shard_bytes: int = SHARD_BYTES


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
    additions to the corpus.

    Raises:
        DataError: A source yields nothing, a document is malformed, a split stays empty, `out` is taken, or the
            disk fails.
    """
    files = find_files(sources)
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
    tell: Callable[[str], None] = say if show_progress else lambda text: None
    try:
        with exclusive_build(out, _identity(files, options, tokenizer, template_hash), tell) as folder:
            if folder is None:
                return load_manifest(out)
            if show_progress:
                say_others(out, folder)
            staging = StagingFolder(folder)
            if staging.num_kept:
                tell(f"going on with {staging.num_kept:,} finished shards of a build that was ended")
            build = ShardBuild(staging, tokenizer, options, [Path(source).name for source in sources], template_hash)
            manifest = _run(build, files, out, processes=processes or _num_processes(files), show=show_progress)
    except OSError as error:
        hint = "See to space and rights there, or choose another folder; finished shards are kept"
        raise DataError(f"documents must be readable and {out} writable", str(error), hint) from error
    for line in remarks(build.notes, tokenizer.name, template):
        tell(line)
    tell(f"built {describe(manifest)} in {time.monotonic() - began_at:.1f} s: {out}")
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


def describe(manifest: Manifest) -> str:
    """Return a phrase that says how much is in the shards, and what was left out."""
    train, held_out = manifest.num_documents("train"), manifest.num_documents("validation")
    num_tokens = manifest.num_tokens("train") + manifest.num_tokens("validation")
    skipped = {
        "empty": manifest.skipped_empty,
        "binary": manifest.skipped_binary,
        "not UTF-8": manifest.skipped_not_utf8,
        "duplicate": manifest.skipped_duplicates,
    }
    notes = [f"{count:,} {kind} skipped" for kind, count in skipped.items() if count]
    parts = [f"{train:,} documents and {held_out:,} held out", f"{num_tokens / 1e6:.2f} M tokens", *notes]
    return ", ".join(parts)


def listing_hash(files: list[SourceFile]) -> str:
    """Return a hash over names and sizes, to notice cheaply that a corpus has changed."""
    return hashlib.sha256("\n".join(f"{file.name} {file.num_bytes}" for file in files).encode(*AS_NAMED)).hexdigest()


@final
class EmptySplitError(DataError):
    """Documents that can never be made shards of."""


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
        self._lowest_ranks: list[float] = []  # two at most
        self._skipped = Counter[str]()
        self._seen: set[bytes] = set()

    def add_files(self, files: list[SourceFile], processes: int, advance: Advance) -> None:
        """Tokenize files and write their documents."""
        settings = Settings(
            tokenizer=self._options.tokenizer,
            end_of_document=self._options.end_of_document,
            parse_special_tokens=self._options.parse_special_tokens,
            add_special_tokens=self._options.add_special_tokens,
            chat_template=self._options.chat_template,
            validation_fraction=self._options.validation_fraction,
            deduplicate=self._options.deduplicate,
        )
        stream = encode_blocks(units.cut_into_blocks(files), settings, processes=processes, known=self.staging.known)
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
            skipped_empty=self._skipped["empty"],
            skipped_binary=self._skipped["binary"],
            skipped_not_utf8=self._skipped["not_utf8"] or None,
            skipped_duplicates=self._skipped["duplicate"] if self._options.deduplicate else None,
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
        ends = np.cumsum(encoded.lengths)
        for number, fate in enumerate(encoded.fates):
            digest = encoded.digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
            if fate or self._is_duplicate(digest):
                self._skipped[FATES[fate] if fate else "duplicate"] += 1
                continue
            rank = float(encoded.ranks[number])
            inside = slice(int(ends[number] - encoded.lengths[number]), int(ends[number]))
            mask = None if encoded.mask is None else encoded.mask[inside]
            num_tokens = self._write(split_of(rank, self._options.validation_fraction), encoded.tokens[inside], mask)
            self._lowest_ranks = sorted([*self._lowest_ranks, rank])[:2]
            self._documents_of[encoded.block.source] += 1
            self._tokens_of[encoded.block.source] += num_tokens

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
        if not num_documents:
            left_out = ", ".join(f"{self._skipped[fate]:,} {fate}" for fate in ("empty", "binary"))
            raise EmptySplitError(
                "a corpus must hold at least one document with text",
                f"{num_files:,} files with {left_out} documents",
                "Correct data.corpus",
            )
        if self.notes["sampled"] and not self.notes["tokens"]:
            raise EmptySplitError(
                "a tokenizer must know some of the text",
                f"no token for any of {self.notes['sampled']:,} documents sampled, by {self._tokenizer.name}",
                "Choose another tokenizer (data.tokenizer, --tokenizer)",
            )
        for split, written in shards.items():
            if not written:
                raise EmptySplitError(
                    "both splits must get at least one document",
                    f"none of {num_documents:,} for {split} at "
                    f"data.validation_fraction={self._options.validation_fraction}",
                    _share_remedy(self._lowest_ranks),
                )


def _share_remedy(ranks: list[float]) -> str:
    if len(ranks) == 1:
        return "Add documents; a document is never divided (JSONL has one per line)"
    share = f"{sum(ranks) / 2:.3g}"
    return (
        f"Set data.validation_fraction={share}, which holds out one of them (--validation-fraction), or add documents"
    )


def _sum_bytes(files: Sequence[SourceFile]) -> int:
    return sum(file.num_bytes for file in files)


def is_built(out: Path, source_listing: str) -> bool:
    """Tell whether a folder holds shards of this very listing; refuse one that holds anything else.

    Raises:
        DataError: It does.
    """
    if (out / MANIFEST_NAME).exists() and load_manifest(out).source_listing == source_listing:
        return True
    check_new_folder(out, DataError)
    return False


def commit(staging: StagingFolder, out: Path, manifest: Manifest) -> None:
    """Write what makes the folder complete and give it its name, unless an equal one has it already."""
    write_index(staging.path, manifest)
    (staging.path / MANIFEST_NAME).write_text(manifest_text(manifest))
    staging.close()
    for path in staging.path.iterdir():
        sync(path)
    try:
        publish(staging.path, out)
    except OSError:
        if not (out / MANIFEST_NAME).exists():
            raise
        if (there := load_manifest(out).fingerprint) != manifest.fingerprint:
            found = f"shards of fingerprint {there}, not {manifest.fingerprint}: {out}"
            hint = "Name another folder, or move that away"
            raise DataError("the folder to write must be new or empty", found, hint) from None
        shutil.rmtree(staging.path)
        sync(out.parent)
