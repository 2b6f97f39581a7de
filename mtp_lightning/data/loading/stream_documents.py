"""Plain WebDataset tars, read from front to back: documents of text or tokens, cut into rows as they come.

What is read is a function of (tars, seed, position at the start, rank, loader process); nothing else is promised about
order. Each rank and each of its loader processes reads tars of its own, over and over, so none ends before the others.
"""

import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys

from mtp_lightning.data.sampling.order import permute
from mtp_lightning.data.sampling.windows import RowArrays
from mtp_lightning.data.shards.arrays import whole_numbers
from mtp_lightning.data.shards.remote import opened
from mtp_lightning.data.shards.tar_members import MOST_MEMBER_BYTES, NO_END, TarDamage, members_of
from mtp_lightning.data.text.compressed import DAMAGE, bounded, decompressed, opened_text
from mtp_lightning.data.text.sources import find_files, matches_of
from mtp_lightning.data.tokenizers.base import Tokenizer
from mtp_lightning.data.tokenizers.open import open_tokenizer
from mtp_lightning.errors import DataError, MtpError
from mtp_lightning.files.paths import is_url, leads_to
from mtp_lightning.files.untrusted import shown
from mtp_lightning.recipe.schema.root import Recipe

PICKLES = frozenset({"pyd", "pkl", "pickle", "pth", "pt", "joblib"})
KINDS = ("txt", "json", "tok", "npy")
COMPRESSED = re.compile(r"\.(gz|bz2|xz|zst)$")
NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
MOST_NUMBERS, LONGEST_NUMBER = 1_000_000, 9
META = re.compile(r"__[^/]*__($|/)|.*\.__(key|url)__$")  # members that webdataset keeps for itself
TAR_NAME = re.compile(r"\.(tar|tgz|tbz2?|txz|tzst)(\.\w+)?$")
STREAM_ORDER = "stream order 1"


def tars_of(patterns: Sequence[str]) -> list[str]:
    """Return the tars that paths, globs and URLs name, sorted.

    Raises:
        DataError: A path or a glob names none, or a folder that is called a tar.

    >>> tars_of(["https://x.org/a-{08..10}.tar"])
    ['https://x.org/a-08.tar', 'https://x.org/a-09.tar', 'https://x.org/a-10.tar']
    >>> tars_of(["s3://b/{0..1}/{8..9}.tar"])
    ['s3://b/0/8.tar', 's3://b/0/9.tar', 's3://b/1/8.tar', 's3://b/1/9.tar']
    """
    tars: set[str] = set()
    for name in itertools.chain.from_iterable(map(_numbered, patterns)):
        tars.update([name] if is_url(name) else _files(name))
    return sorted(tars)


def _files(name: str) -> list[str]:
    for path in matches_of(name):
        is_folder = leads_to(path, Path.is_dir)
        is_other = leads_to(path) and not is_folder and not path.is_file()  # a pipe would be waited for
        if is_other or (is_folder and TAR_NAME.search(path.name)):
            raise DataError(
                "tars of data.stream must be files",
                f"{str(path)!r}, which is {'no file' if is_other else 'a folder'}",
                "Copy the tar again from its source, or give a folder of tars another name",
            )
    return [str(file.path) for file in find_files([name])]


def _numbered(pattern: str, most: int = MOST_NUMBERS) -> list[str]:
    """Write each `{00..17}` out; `most` bounds how many names there are in all."""
    found = NUMBERS.search(pattern)
    if not found:
        return [pattern]
    low, high = found.groups()
    count = int(high) - int(low) + 1 if max(len(low), len(high)) <= LONGEST_NUMBER else most + 1
    if not 1 <= count <= most:
        raise DataError(
            f"{{first..last}} in a name of data.stream must stand for 1 to {MOST_NUMBERS:,} numbers in all",
            shown(found[0]),
            "Give the lower number first, fewer tars, or several patterns",
        )
    numbers = [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
    names = (pattern[: found.start()] + number + pattern[found.end() :] for number in numbers)
    return [name for one in names for name in _numbered(one, most // count)]


@final
@dataclass(frozen=True, kw_only=True)
class TarDocuments:
    """The documents of tars, as token ids."""

    tokenizer: str
    end_of_document: int | None
    text_field: str
    token_type: str
    vocab_size: int
    parse_special_tokens: bool = False
    add_special_tokens: bool = False
    member: str | None = None
    encoding: str | None = None

    @staticmethod
    def of(recipe: Recipe) -> "TarDocuments":
        """Read as a recipe says."""
        stream = recipe.data.stream
        assert stream is not None, "a rule of the recipe"
        return TarDocuments(
            tokenizer=recipe.data.tokenizer,
            end_of_document=recipe.data.end_of_document,
            parse_special_tokens=recipe.data.parse_special_tokens,
            add_special_tokens=recipe.data.add_special_tokens,
            text_field=stream.text_field,
            token_type=stream.token_type,
            vocab_size=recipe.model.vocab_size,
            member=stream.member and stream.member.lower().removeprefix("."),
            encoding=recipe.data.encoding,
        )

    def read(self, tar: str) -> Iterator[NDArray[Any]]:
        """Yield the documents of one tar, each with its end.

        Raises:
            DataError: The tar is damaged, a sample is none of the known kinds, or an id is not in the vocabulary.
        """
        tokenizer = open_tokenizer(
            self.tokenizer,
            end_of_document=self.end_of_document,
            parse_special_tokens=self.parse_special_tokens,
            add_special_tokens=self.add_special_tokens,
        )
        for sample in _samples(tar, self._is_document):
            place = f"{tar}, sample {shown(sample['__key__'])}"
            tokens = self._tokens(sample, tokenizer, place)
            if tokens.size and tokens[-1] != tokenizer.end_of_document:
                tokens = np.append(tokens, tokens.dtype.type(tokenizer.end_of_document))
            if tokens.size:
                self._check(tokens, place)
                yield tokens

    def _is_document(self, name: str) -> bool:
        """Tell whether a member of a tar is read."""
        suffix = name.rpartition("/")[2].partition(".")[2].lower()
        return suffix == self.member if self.member else _kind(suffix) in KINDS

    def _tokens(self, sample: dict[str, Any], tokenizer: Tokenizer, place: str) -> NDArray[Any]:
        if self.member and self.member in sample:
            members = [self.member]
        else:
            members = [] if self.member else [name for name in sample if COMPRESSED.sub("", name) in KINDS]
        if len(members) != 1:
            raise self._no_member(sample, place)
        kind = _kind(members[0])
        content = _unpacked(sample[members[0]], f"{place}.{members[0]}")
        if kind == "tok":
            return _array_of(content, self.token_type, place).astype(np.int64)
        if kind == "npy":
            return _numpy_array(content, place).astype(np.int64)
        tokens = tokenizer.encode_many([self._text(content, kind, f"{place}.{members[0]}")])[0]
        framed = [tokenizer.opening, tokens, tokenizer.closing] if tokens.size else [tokens]
        return np.concatenate([np.array(part, dtype=np.int64) for part in framed])

    def _no_member(self, sample: dict[str, Any], place: str) -> DataError:
        """Return the error that it is not clear which member of a sample is the document."""
        names = [name for name in sample if not name.startswith("__")]
        near = next((name for name in names if _kind(name) in KINDS), None)
        wanted = (
            f"one of .{', .'.join(KINDS)} right after its key, which has no dot" if not self.member else self.member
        )
        hint = f"Name the one that is meant: data.stream.member={near}" if near else ""
        return _wrong(place, wanted, shown(f".{', '.join(names)}"), hint)

    def _text(self, content: bytes, kind: str, place: str) -> bytes:
        try:
            with opened_text(io.BytesIO(content), place, self.encoding) as stream:
                text = stream.read().decode()
            value = json.loads(text)[self.text_field] if kind == "json" else text
            if isinstance(value, str):
                return value.encode()
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            wanted = f"JSON with the field {self.text_field}" if kind == "json" else "UTF-8 text"
            raise _wrong(place, wanted, f"{type(error).__name__}: {shown(error)}") from error
        raise _wrong(place, f"text in the field {self.text_field}", type(value).__name__)

    def _check(self, tokens: NDArray[Any], place: str) -> None:
        wrong = np.flatnonzero((tokens >= self.vocab_size) | (tokens < 0))
        if wrong.size:
            at = int(wrong[0])
            raise DataError(
                f"every token id must be at least 0 and below model.vocab_size = {self.vocab_size:,}",
                f"id {tokens[at]:,} at {place}, token {at:,}",
                "Raise model.vocab_size, or take the tokenizer and the data.stream.token_type of the tars",
            )


def _kind(suffix: str) -> str:
    """Return what follows the last dot of a suffix, that of a compression left out."""
    return COMPRESSED.sub("", suffix).rpartition(".")[2]


def _unpacked(content: bytes, place: str) -> bytes:
    """Decompress a member that is compressed."""
    stream = io.BufferedReader(io.BytesIO(content))
    try:
        unpacked = bounded(decompressed(stream, place), MOST_MEMBER_BYTES)
    except DAMAGE as error:
        raise _wrong(place, "readable to its end", f"{type(error).__name__}: {shown(error)}") from error
    if unpacked is None:
        raise _wrong(place, f"at most {MOST_MEMBER_BYTES:,} bytes when it is decompressed", "more")
    return unpacked


def _samples(tar: str, is_document: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """Yield what webdataset finds in a tar: samples of members by suffix, none of them decoded."""
    try:
        with opened(tar) if is_url(tar) else Path(tar).open("rb") as stream:
            yield from _samples_of(tar, stream, is_document)
    except OSError as error:
        raise _damaged(tar, error) from error


def _samples_of(tar: str, stream: BinaryIO, is_document: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    num_bytes = None if is_url(tar) else os.fstat(stream.fileno()).st_size
    members = members_of(stream, is_document, num_bytes)
    files = ({"fname": name, "data": content, "__url__": tar} for name, content in members if not META.match(name))
    try:
        for sample in group_by_keys(files):
            pickles = [name for name in sample if name.rpartition(".")[2] in PICKLES]
            if pickles:
                member = f"{tar}, sample {shown(sample['__key__'])}.{shown(pickles[0])}"
                raise _wrong(member, "no pickle, which can run any program when it is read", "one")
            yield sample
    except (TarDamage, ValueError) as error:  # the latter of webdataset, for two members of one name
        raise _damaged(tar, error) from error


def _damaged(tar: str, error: Exception) -> DataError:
    is_ours = isinstance(error, TarDamage)
    hint = "Copy it again from its source, or leave it out of data.stream"
    if NO_END in str(error):
        hint += "; if it is known to be whole, end it: head -c 1024 /dev/zero >> FILE"
    return DataError(
        f"{tar} must be a whole tar of WebDataset samples",
        str(error) if is_ours else f"{type(error).__name__}: {shown(error)}",
        hint,
    )


def _array_of(content: bytes, dtype: str, place: str) -> NDArray[Any]:
    size = np.dtype(dtype).itemsize
    if len(content) % size:
        raise _wrong(
            f"{place}.tok", f"{dtype} ids, {size} bytes each (data.stream.token_type)", f"{len(content)} bytes"
        )
    return np.frombuffer(content, dtype=np.dtype(dtype).newbyteorder("<"))


def _numpy_array(content: bytes, place: str) -> NDArray[Any]:
    try:
        return whole_numbers(content)
    except ValueError as error:
        wanted = "an array of whole numbers, without pickled objects"
        raise _wrong(f"{place}.npy", wanted, shown(error)) from error


def _wrong(place: str, wanted: str, found: str, hint: str = "") -> DataError:
    return DataError(f"{place} must be {wanted}", found, hint or "Write the tar anew, or leave it out of data.stream")


def rows_of(documents: Iterator[NDArray[Any]], *, seq_len: int, width_tokens: int) -> Iterator[RowArrays]:
    """Cut documents, one after another, into rows of T + n tokens, the next one T tokens later."""
    tokens, owners = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int32)
    for number, document in enumerate(documents):
        tokens = np.concatenate([tokens, document])
        owners = np.concatenate([owners, np.full(document.size, number, dtype=np.int32)])
        while tokens.size >= width_tokens:
            yield {"tokens": tokens[:width_tokens], "documents": owners[:width_tokens] - owners[0]}
            tokens, owners = tokens[seq_len:], owners[seq_len:]


@final
@dataclass(frozen=True, kw_only=True)
class StreamRows(IterableDataset[RowArrays | MtpError]):
    """The endless rows of one rank, from the tars of each of its loader processes."""

    documents: TarDocuments
    tars: list[str]
    seq_len: int
    width_tokens: int
    seed: int
    begin: str  # where the run stood when it was started: each start reads the tars in an order of its own
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[RowArrays | MtpError]:
        """Yield rows; an error as what it is, because torch would lose it between processes."""
        try:
            yield from rows_of(self._read(), seq_len=self.seq_len, width_tokens=self.width_tokens)
        except MtpError as error:
            yield error

    def own_tars(self, reader: int, num_readers: int) -> list[str]:
        """Return the tars of one of this rank's loader processes, by numbers given here and not by the environment."""
        return self.tars[self.rank * num_readers + reader :: self.world_size * num_readers]

    def _read(self) -> Iterator[NDArray[Any]]:
        worker = get_worker_info()
        tars = self.own_tars(worker.id, worker.num_workers) if worker else self.own_tars(0, 1)
        for epoch in itertools.count():
            has_any = False
            purpose = f"{STREAM_ORDER}, {self.begin}"
            for number in permute(np.arange(len(tars)), seed=self.seed, epoch=epoch, size=len(tars), purpose=purpose):
                for document in self.documents.read(tars[number]):
                    has_any = True
                    yield document
            if not has_any:
                raise DataError("tars must hold documents", f"none in {', '.join(tars)}", "Correct data.stream")


def joined_rows(rows: Sequence[RowArrays]) -> RowArrays:
    """Return single rows as arrays (B, T+n)."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
