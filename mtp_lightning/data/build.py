"""Build shards: documents in, tar shards with manifest and index out, all or nothing."""

import glob
import hashlib
import os
import secrets
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import final

import numpy as np

from mtp_lightning.data.index import write_index
from mtp_lightning.data.manifest import MANIFEST_NAME, Manifest, Shard, Split, load_manifest, manifest_text
from mtp_lightning.data.progress import Advance, say, watched
from mtp_lightning.data.shard_writer import MEMBER_TOKENS, SHARD_BYTES, SplitWriter
from mtp_lightning.data.sources import Document, SourceFile, documents_of, find_files
from mtp_lightning.data.tokenizers import Tokenizer, open_tokenizer, token_dtype
from mtp_lightning.errors import DataError

AS_NAMED = ("utf-8", "surrogateescape")  # file names need not be UTF-8
BYTES_PER_ADVANCE = 1 << 20


def build_shards(
    sources: list[str],
    out: Path,
    *,
    tokenizer: str,
    validation_share: float,
    show_progress: bool = True,
    member_tokens: int = MEMBER_TOKENS,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Tokenize the documents of all sources into the new folder `out`; equal documents give equal bytes.

    The folder appears under its name only when it is complete; when the same one is there already, or another
    process completes it first, that one is kept. Which documents are held out depends on their names alone, so
    it survives additions to the corpus.

    Raises:
        DataError: A source yields nothing, a document is malformed, a split stays empty, `out` is taken, or the
            disk fails.
    """
    files = find_files(sources)
    _refuse_taken(out, listing_hash(files))
    began_at = time.monotonic()
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}-{secrets.token_hex(2)}")
    build = _Build(partial, open_tokenizer(tokenizer), validation_share)
    build.begin(member_tokens=member_tokens, shard_bytes=shard_bytes)
    if show_progress:
        _say_unfinished(out)
    try:
        partial.mkdir(parents=True)
        with watched("building shards", total_bytes=_sum_bytes(files), show=show_progress) as advance:
            build.add_files(files, advance)
        manifest = build.close(files)
        _commit(partial, out, manifest)
    except OSError as error:
        remedy = "See to space and rights there, or choose another folder"
        raise DataError(f"documents must be readable and {out} writable", str(error), remedy) from error
    finally:
        build.abandon()
        shutil.rmtree(partial, ignore_errors=True)
    if show_progress:
        say(f"built {describe(manifest)} in {time.monotonic() - began_at:.1f} s: {out}")
    return manifest


def describe(manifest: Manifest) -> str:
    """Return a phrase that says how much is in the shards, and what was left out."""
    train, held_out = manifest.num_documents("train"), manifest.num_documents("validation")
    num_tokens = manifest.num_tokens("train") + manifest.num_tokens("validation")
    skipped = {"empty": manifest.skipped_empty, "binary": manifest.skipped_binary}
    notes = [f"{count:,} {kind} skipped" for kind, count in skipped.items() if count]
    parts = [f"{train:,} documents and {held_out:,} held out", f"{num_tokens / 1e6:.2f} M tokens", *notes]
    return ", ".join(parts)


def listing_hash(files: list[SourceFile]) -> str:
    """Return a hash over names and sizes, to notice cheaply that a corpus has changed."""
    return hashlib.sha256("\n".join(f"{file.name} {file.num_bytes}" for file in files).encode(*AS_NAMED)).hexdigest()


def held_out_rank(name: str) -> float:
    """Return a number in [0, 1) that depends on a document's name only; low ones are held out first."""
    return int.from_bytes(hashlib.sha256(name.encode(*AS_NAMED)).digest()[:6], "big") / 2**48


@final
class _Build:
    """One build on its way: a writer per split and what was counted so far."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, validation_share: float) -> None:
        self._folder = folder
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocabulary)
        self._validation_share = validation_share
        self._writers: dict[Split, SplitWriter] = {}
        self._num_documents = 0
        self._lowest_ranks: list[float] = []  # two at most
        self._skipped = Counter[str]()
        self._largest_token = tokenizer.end_of_document

    def begin(self, *, member_tokens: int, shard_bytes: int) -> None:
        splits: tuple[Split, ...] = ("train", "validation")
        for split in splits:
            self._writers[split] = SplitWriter(
                self._folder, split, member_tokens=member_tokens, shard_bytes=shard_bytes
            )

    def add_files(self, files: list[SourceFile], advance: Advance) -> None:
        num_bytes = 0
        for file in files:
            for document in documents_of(file):
                self._add(document)
                num_bytes += document.source_bytes
                if num_bytes >= BYTES_PER_ADVANCE:
                    advance(num_bytes)
                    num_bytes = 0

    def close(self, files: list[SourceFile]) -> Manifest:
        shards = {split: writer.close() for split, writer in self._writers.items()}
        self._refuse_empty(shards, files)
        return Manifest(
            dtype="uint16" if self._dtype.itemsize == 2 else "uint32",
            tokenizer=self._tokenizer.name,
            tokenizer_hash=self._tokenizer.fingerprint(),
            vocabulary=self._tokenizer.vocabulary,
            end_of_document=self._tokenizer.end_of_document,
            largest_token=self._largest_token,
            validation_share=self._validation_share,
            source_files=len(files),
            source_bytes=_sum_bytes(files),
            source_listing=listing_hash(files),
            skipped_empty=self._skipped["empty"],
            skipped_binary=self._skipped["binary"],
            shards=shards["train"] + shards["validation"],
        )

    def abandon(self) -> None:
        """Let go of files that are still open; of no effect after `close`."""
        for writer in self._writers.values():
            writer.abandon()

    def _add(self, document: Document) -> None:
        if not document.text or document.is_binary:
            self._skipped["binary" if document.text else "empty"] += 1
            return
        end = np.array([self._tokenizer.end_of_document], dtype=self._dtype)
        prompt = self._tokenizer.encode(document.prompt)
        tokens = np.concatenate([prompt, self._tokenizer.encode(document.text), end], dtype=self._dtype)
        self._largest_token = max(self._largest_token, int(tokens.max()))
        rank = held_out_rank(document.name)
        self._num_documents += 1
        self._lowest_ranks = sorted([*self._lowest_ranks, rank])[:2]
        writer = self._writers["validation" if rank < self._validation_share else "train"]
        writer.add(tokens, prompt_tokens=prompt.size)

    def _refuse_empty(self, shards: dict[Split, list[Shard]], files: list[SourceFile]) -> None:
        if not self._num_documents:
            empty, binary = self._skipped["empty"], self._skipped["binary"]
            raise DataError(
                "a corpus must hold at least one document with text",
                f"{len(files):,} files with {empty:,} empty and {binary:,} binary documents",
                "Correct data.corpus",
            )
        for split, written in shards.items():
            if not written:
                raise DataError(
                    "both splits must get at least one document",
                    f"none of {self._num_documents:,} for {split} at data.validation_share={self._validation_share}",
                    _share_remedy(self._lowest_ranks),
                )


def _share_remedy(ranks: list[float]) -> str:
    if len(ranks) == 1:
        return "Add documents; a document is never divided (JSONL has one per line)"
    return f"Set data.validation_share={sum(ranks) / 2:.3g}, which holds out one of them, or add documents"


def _sum_bytes(files: list[SourceFile]) -> int:
    return sum(file.num_bytes for file in files)


def _refuse_taken(out: Path, source_listing: str) -> None:
    """Refuse a folder with anything in it, unless it may turn out to be the one to be built."""
    if (out / MANIFEST_NAME).exists() and load_manifest(out).source_listing == source_listing:
        return
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        found = "a file" if out.is_file() else f"a folder with {sum(1 for _ in out.iterdir())} entries"
        raise _taken(out, found)


def _taken(out: Path, found: str) -> DataError:
    must_hold = f"shards must be built into a folder of their own ({out})"
    return DataError(must_hold, found, "Remove it, or choose another folder")


def _say_unfinished(out: Path) -> None:
    for path in sorted(out.parent.glob(f"{glob.escape(out.name)}.partial-*")):
        say(f"{path} was left by a build that was killed, unless another process is at work on it; it may be removed")


def _commit(partial: Path, out: Path, manifest: Manifest) -> None:
    """Write what makes the folder complete and give it its name, unless an equal one has it already."""
    write_index(partial, manifest)
    (partial / MANIFEST_NAME).write_text(manifest_text(manifest))
    for path in (*partial.iterdir(), partial):
        _fsync(path)
    try:
        partial.rename(out)  # replaces an empty folder, refuses any other
    except OSError:
        if not (out / MANIFEST_NAME).exists():
            raise
        fingerprint = load_manifest(out).fingerprint
        if fingerprint != manifest.fingerprint:
            raise _taken(out, f"shards of fingerprint {fingerprint}, not {manifest.fingerprint}") from None
    _fsync(out.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
