"""Adopt a folder of tokens that others wrote: read every token once, write where documents lie, copy nothing."""

import dataclasses
import hashlib
import itertools
import json
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, Literal, final

import numpy as np
from numpy.typing import NDArray

from mtp_lightning.console.progress import Advance, say, watched
from mtp_lightning.data.adopted.find import Found, Layout, find, token_files
from mtp_lightning.data.adopted.token_file import Run, TokenFile, Words, runs_by_token
from mtp_lightning.data.shards.index import write_index
from mtp_lightning.data.shards.manifest import (
    LENGTHS_NAME,
    LINK_NAME,
    MANIFEST_NAME,
    SPLITS,
    AdoptedIndex,
    AdoptedManifest,
    AdoptedMember,
    AdoptedShard,
    Manifest,
    Split,
    describe,
    load_manifest,
    manifest_text,
)
from mtp_lightning.data.shards.staging import exclusive_build, say_others
from mtp_lightning.data.shards.writer import MEMBER_TOKENS
from mtp_lightning.data.tokenizers.open import open_tokenizer
from mtp_lightning.errors import DataError, refusal_of
from mtp_lightning.files.atomic_folder import check_new_folder, publish
from mtp_lightning.files.durable import describe_file, sync
from mtp_lightning.files.untrusted import shown

MOST_MEMBERS = 1 << 20  # a manifest of 256 MB
HELD_OUT_NAMES = {"val", "valid", "validation", "test", "dev", "eval", "heldout", "held_out"}


@dataclass(frozen=True, kw_only=True)
class AdoptOptions:
    """What is told of tokens that others wrote."""

    layout: Layout | None = None  # found by the names of the files unless given
    tokenizer: str | None = None
    vocab_size: int | None = None  # without a tokenizer
    end_of_document: int | None = None  # the tokenizer's own unless given
    begin_of_document: int | None = None
    documents: Literal["index", "eos", "bos"] | None = None  # by the index where the format has one
    dtype: str | None = None  # of files without a header
    validation_fraction: float = 0.03
    validation: str | None = None  # pattern of files that are held out, in place of a share
    member_tokens: int = MEMBER_TOKENS


@dataclass(frozen=True)
class _Vocabulary:
    tokenizer: str
    fingerprint: str
    size: int
    end: int


def adopt(path: Path, out: Path | None, options: AdoptOptions) -> Manifest:
    """Write into the new folder `out` what makes shards of a folder of tokens, which are read in place ever after.

    Every token is read once, for its digest and to see that it is in the vocabulary. The folder appears under its name
    only when it is complete. It holds a link to the tokens, the lengths of the documents (4 bytes each), manifest and
    index. What is held out is the end of files, whole documents, as near to the share as these allow.

    Raises:
        DataError: There are no tokens, they are not what their format says, or `out` is taken or cannot be written.
    """
    vocabulary = _vocabulary(options)
    found = find(path, options.layout)
    out = out or found.root.with_name(f"{found.root.name}-adopted")
    check_new_folder(out, DataError)
    files = [
        file for file in token_files(found, dtype=options.dtype, vocab_size=vocabulary.size) if file.num_tokens > 0
    ]
    _say_doubts(found, files, options)
    by = options.documents or ("eos" if found.layout == "npy" else "index")
    identity = json.dumps([dataclasses.asdict(options), str(found.root), [str(file.path) for file in files]])
    with _said(out), exclusive_build(out, hashlib.sha256(identity.encode()).hexdigest(), say) as folder:
        if folder is None:
            return load_manifest(out)
        say_others(out, folder)
        with _emptied(folder):
            manifest = _adopt(_Adoption(found, files, vocabulary, options, by), folder)
            _write(manifest, found, folder)
            publish(folder, out)
    say(f"adopted {describe(manifest)}; no token was copied: {out}")
    return manifest


def _say_doubts(found: Found, files: list[TokenFile], options: AdoptOptions) -> None:
    """Name files that look as if they were to be held out."""
    names = (found.name_of(file.path) for file in files)
    held_out = next((name for name in names if HELD_OUT_NAMES & {*name.split("/")[:-1], Path(name).stem}), None)
    if held_out and options.validation is None:
        say(f"{shown(held_out)} is trained on as all files are; --validation PATTERN holds files out")


def _adopt(adoption: "_Adoption", folder: Path) -> AdoptedManifest:
    """Read all files; if that holds nothing out, again, with the end of the last one held out whatever its length."""
    shards = adoption.read(folder / LENGTHS_NAME, None)
    if shards["train"] and not shards["validation"] and adoption.options.validation is None:
        shards = adoption.read(folder / LENGTHS_NAME, shards["train"][-1])
    if all(shards.values()):
        return adoption.manifest(shards)
    raise DataError(
        f"{adoption.found.root} must hold tokens to train on and some to hold out",
        f"none to {'train on' if shards['validation'] else 'hold out' if shards['train'] else 'read'}",
        "Name the files to hold out (--validation), another share (--validation-fraction), or another folder",
    )


@final
@dataclass
class _Adoption:
    found: Found
    files: list[TokenFile]
    vocabulary: _Vocabulary
    options: AdoptOptions
    by: Literal["index", "eos", "bos"]
    largest: int = 0
    at_bytes: int = 0  # in the file of lengths

    def read(self, lengths_path: Path, last: AdoptedShard | None) -> dict[Split, list[AdoptedShard]]:
        """Read every token, and write the lengths of all documents.

        Args:
            lengths_path: where to.
            last: what was to be trained on of a file of which something must be held out.
        """
        self.at_bytes = self.largest = 0
        seen = held = 0
        shards: dict[Split, list[AdoptedShard]] = {split: [] for split in SPLITS}
        total = sum(file.num_tokens * file.dtype.itemsize for file in self.files)
        with watched("adopting", total_bytes=total, show=True) as advance, lengths_path.open("wb") as lengths:
            for file in self.files:
                seen += file.num_tokens
                begin = file.num_tokens - self._budget(file, seen, held)
                must = last is not None and last.name == self._name(file.path)
                if last is not None and must:
                    begin = last.num_tokens - max(1, int(self.options.validation_fraction * last.num_tokens))
                for shard in self._shards_of(file, self._parts(file, begin, must_hold_out=must), lengths, advance):
                    shards[shard.split].append(shard)
                    held += shard.num_tokens if shard.split == "validation" else 0
        return shards

    def manifest(self, shards: dict[Split, list[AdoptedShard]]) -> AdoptedManifest:
        """Describe all."""
        listing = "\n".join(f"{self.found.name_of(file.path)} {file.num_tokens}" for file in self.files)
        indexes = {file.index for file in self.files if file.index is not None and self.by == "index"}
        records = [(self._name(path), describe_file(path, is_synced=True)) for path in sorted(indexes)]
        is_narrow = all(file.dtype.itemsize <= 2 for file in self.files) or self.vocabulary.size <= 1 << 16
        return AdoptedManifest(
            layout=self.found.layout,
            documents_by=self.by,
            dtype="uint16" if is_narrow else "uint32",
            tokenizer=self.vocabulary.tokenizer,
            tokenizer_hash=self.vocabulary.fingerprint,
            vocabulary=self.vocabulary.size,
            end_of_document=self.vocabulary.end,
            largest_token=self.largest,
            validation_share=self.options.validation_fraction,
            source_files=len(self.files),
            source_bytes=sum(file.path.stat().st_size for file in self.files),
            source_listing=hashlib.sha256(listing.encode()).hexdigest(),
            skipped_empty=0,
            skipped_binary=0,
            indexes=[AdoptedIndex(name=name, num_bytes=own.size_bytes, sha256=own.sha256) for name, own in records],
            shards=shards["train"] + shards["validation"],
        )

    def _name(self, path: Path) -> str:
        return f"{LINK_NAME}/{self.found.name_of(path)}"

    def _budget(self, file: TokenFile, seen: int, held: int) -> int:
        """Return how many tokens of a file may be held out."""
        if self.options.validation is not None:
            return file.num_tokens if fnmatchcase(self.found.name_of(file.path), self.options.validation) else 0
        return min(file.num_tokens, max(0, int(self.options.validation_fraction * seen) - held))

    def _parts(self, file: TokenFile, begin: int, *, must_hold_out: bool) -> Iterator[tuple[Split, Run]]:
        """Yield the documents before and from a token on, each run of at most a member's tokens or of one document."""
        token = self.options.begin_of_document if self.by == "bos" else self.vocabulary.end
        runs = file.runs if self.by == "index" else runs_by_token(token or 0, self.by)
        done = 0
        for run in runs(file.words()):
            lengths = run.lengths
            if must_hold_out and done == 0 and lengths.size == 1 and lengths[0] > begin > 0:  # of one document the end
                lengths = np.array([begin, lengths[0] - begin])
            ends = np.cumsum(lengths)
            begins = done + ends - lengths
            is_held = (begins > 0) & (begins + lengths > begin) if must_hold_out else begins >= begin
            cuts = {0, int((~is_held).sum()), lengths.size}
            cuts |= set(
                np.searchsorted(ends, np.arange(self.options.member_tokens, ends[-1], self.options.member_tokens))
            )
            for first, last in itertools.pairwise(sorted(int(cut) for cut in cuts)):
                split: Split = "validation" if is_held[first] else "train"
                yield split, Run(run.start + int(ends[first] - lengths[first]), lengths[first:last])
            done += int(ends[-1])

    def _shards_of(
        self, file: TokenFile, parts: Iterator[tuple[Split, Run]], lengths: BinaryIO, advance: Advance
    ) -> Iterator[AdoptedShard]:
        members: dict[Split, list[AdoptedMember]] = {split: [] for split in SPLITS}
        digests = {split: hashlib.sha256() for split in SPLITS}
        words = file.words()
        for split, run in _joined(parts, self.options.member_tokens):
            tokens = words[run.start : run.start + int(run.lengths.sum())]
            self._check(file, run, tokens)
            own = run.lengths.astype("<u4").tobytes()
            lengths.write(own)
            digests[split].update(tokens.data)
            member = AdoptedMember(
                key=f"{len(members[split]):09d}",
                tokens_at=file.begin_bytes + run.start * file.dtype.itemsize,
                num_tokens=tokens.size,
                tokens_crc32=zlib.crc32(tokens.data),
                lengths_at=self.at_bytes,
                num_documents=run.lengths.size,
                lengths_crc32=zlib.crc32(own),
            )
            members[split].append(member)
            self.at_bytes += len(own)
            advance(tokens.nbytes)
        for split, own_members in members.items():
            if own_members:
                yield AdoptedShard(
                    name=self._name(file.path),
                    split=split,
                    num_bytes=file.path.stat().st_size,
                    sha256=digests[split].hexdigest(),
                    stored=file.dtype.str,
                    members=own_members,
                )

    def _check(self, file: TokenFile, run: Run, tokens: Words) -> None:
        least, most = int(tokens.min()), int(tokens.max())
        self.largest = max(self.largest, most)
        if least < 0 or most >= self.vocabulary.size:
            at = run.start + int(tokens.argmin() if least < 0 else tokens.argmax())
            raise DataError(
                f"every token id must be in [0, {self.vocabulary.size:,}), the vocabulary",
                f"id {least if least < 0 else most:,} as {file.dtype.name} at token {at:,} of {file.path}",
                "Name the tokenizer (--tokenizer) or the size of the vocabulary (--vocab-size) that these tokens are "
                "of; of files without a header the type as well (--dtype)",
            )
        if run.lengths.max() >= 1 << 32:
            raise DataError(
                f"a document must have less than {1 << 32:,} tokens",
                f"{run.lengths.max():,} in {file.path}",
                "Name what documents end with: --documents eos, --end-of-document ID",
            )


def _joined(parts: Iterator[tuple[Split, Run]], most_tokens: int) -> Iterator[tuple[Split, Run]]:
    """Join runs of one split that follow one another, up to so many tokens.

    Raises:
        DataError: They jump about so much that a manifest cannot list them.
    """
    for number, (split, start, lengths) in enumerate(_joined_lists(parts, most_tokens)):
        if number == MOST_MEMBERS:
            raise DataError(
                "documents must lie one after another in their file",
                f"more than {MOST_MEMBERS:,} jumps",
                "Write the folder again with its tool, in the order of its index",
            )
        yield split, Run(start, np.concatenate(lengths))


def _joined_lists(
    parts: Iterator[tuple[Split, Run]], most_tokens: int
) -> Iterator[tuple[Split, int, list[NDArray[np.int64]]]]:
    split, start, end = SPLITS[0], 0, 0
    lengths: list[NDArray[np.int64]] = []
    for own_split, run in parts:
        num_tokens = int(run.lengths.sum())
        if (own_split, run.start) != (split, end) or end - start + num_tokens > most_tokens:
            if lengths:
                yield split, start, lengths
            split, start, end, lengths = own_split, run.start, run.start, []
        lengths.append(run.lengths)
        end += num_tokens
    if lengths:
        yield split, start, lengths


def _vocabulary(options: AdoptOptions) -> _Vocabulary:
    """Return what the ids are of.

    Raises:
        DataError: The tokenizer cannot be opened, or neither it nor size and end are told.
    """
    if options.tokenizer is not None:
        tokenizer = open_tokenizer(options.tokenizer, end_of_document=options.end_of_document)
        return _Vocabulary(tokenizer.name, tokenizer.fingerprint(), tokenizer.vocab_size, tokenizer.end_of_document)
    size, end = options.vocab_size, options.end_of_document
    if size is None or end is None or end >= size:
        found = "neither" if size is None or end is None else f"end of document {end:,} of {size:,} ids"
        hint = "Give --tokenizer, or --vocab-size and --end-of-document"
        raise DataError("tokens must have a known tokenizer, or size of vocabulary and end of document", found, hint)
    return _Vocabulary("", "", size, end)


def _write(manifest: AdoptedManifest, found: Found, folder: Path) -> None:
    (folder / LINK_NAME).symlink_to(found.root)
    write_index(folder, manifest)
    (folder / MANIFEST_NAME).write_text(manifest_text(manifest))
    for path in folder.iterdir():
        if not path.is_symlink():
            sync(path)


@contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    """Remove what a process that was ended has left in a folder, and the folder when this one fails."""
    for path in folder.iterdir():
        path.unlink()
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _said(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "See to space and rights, or name another folder with --out"
        raise DataError(f"tokens must be readable and {out} writable", refusal_of(error, out), hint) from error
