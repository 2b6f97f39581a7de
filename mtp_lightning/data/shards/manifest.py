"""The manifest of a shard folder: what the shards hold, and the fingerprint that names these very tokens."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mtp_lightning.errors import DataError
from mtp_lightning.files.untrusted import read_bounded, shown

FORMAT_VERSION = 1
ADOPTED_VERSION = 2
MANIFEST_NAME = "manifest.json"
LINK_NAME = "data"
"""The link in the folder of an adoption to the folder that was adopted."""
LENGTHS_NAME = "documents.u32"
"""The lengths of all documents of an adoption, little-endian."""
MOST_MANIFEST_BYTES = 1 << 30  # four million members, 4 x 10^12 tokens
TAR_BLOCK_BYTES = 512
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


# What others wrote becomes a path, a size or a loop only within these bounds.
ShardName = Annotated[str, Field(pattern=r"^(train|validation)/[0-9A-Za-z][0-9A-Za-z._-]{0,127}\.tar$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Key = Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]{1,64}$")]
Text = Annotated[str, Field(max_length=4096)]
Count = Annotated[int, Field(ge=0, le=2**62)]
FileSize = Annotated[int, Field(ge=TAR_BLOCK_BYTES, le=1 << 40, multiple_of=TAR_BLOCK_BYTES)]
Place = Annotated[int, Field(ge=0, le=1 << 40, multiple_of=TAR_BLOCK_BYTES)]  # payloads begin with a block of a tar
InShard = Annotated[int, Field(ge=1, le=1 << 40)]
Checksum = Annotated[int, Field(ge=0, lt=1 << 32)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 32)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Member(_Frozen):
    """A run of whole documents in a shard: `KEY.tok` (token ids), `KEY.len` (document lengths), maybe `KEY.msk`.

    The mask has a byte per token: 1 where it may be a target, 0 where it is only read (a prompt). A member
    without one has targets only.
    """

    key: Key
    tokens_at: Place  # byte offset of the token ids in the shard file
    num_tokens: InShard
    tokens_crc32: Checksum
    lengths_at: Place  # byte offset of the document lengths in the shard file
    num_documents: InShard
    lengths_crc32: Checksum
    mask_at: Place | None = None  # byte offset of the loss mask in the shard file
    mask_crc32: Checksum | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.num_documents > self.num_tokens:
            raise ValueError(f"{self.num_documents:,} documents of {self.num_tokens:,} tokens, their ends included")
        if (self.mask_at is None) != (self.mask_crc32 is None):
            raise ValueError("a mask has both a place and a checksum")
        return self

    def end(self, token_bytes: int) -> int:
        """Return the byte of the shard file after the last one of the member."""
        mask_end = 0 if self.mask_at is None else self.mask_at + self.num_tokens
        return max(self.tokens_at + token_bytes * self.num_tokens, self.lengths_at + 4 * self.num_documents, mask_end)


class Shard(_Frozen):
    """One tar file."""

    name: ShardName  # path inside the shard folder
    split: Split
    num_bytes: FileSize
    sha256: Digest
    members: Sequence[Member] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_where_it_belongs(self) -> Self:
        if not self.name.startswith(f"{self.split}/"):
            raise ValueError(f"{self.name} is not in the folder of its split, {self.split}")
        return self

    @property
    def lengths_name(self) -> str:
        """The file of the shard folder that has the lengths of its documents."""
        return self.name

    def stored_as(self, dtype: str) -> np.dtype[Any]:
        """Return the type in which the file holds token ids that are read as another."""
        return np.dtype(dtype).newbyteorder("<")

    def member_beyond(self, dtype: str) -> Member | None:
        """Return the first member that reaches beyond the file."""
        token_bytes = self.stored_as(dtype).itemsize
        return next((member for member in self.members if member.end(token_bytes) > self.num_bytes), None)

    @property
    def num_tokens(self) -> int:
        """Token ids in the shard, end-of-document included."""
        return sum(member.num_tokens for member in self.members)

    @property
    def num_documents(self) -> int:
        """Documents in the shard."""
        return sum(member.num_documents for member in self.members)


class AdoptedMember(Member):
    """A run of whole documents in a file that others wrote; it may begin at any byte."""

    tokens_at: Annotated[int, Field(ge=0, le=1 << 60)]
    lengths_at: Annotated[int, Field(ge=0, le=1 << 60, multiple_of=4)]  # in the file of lengths

    def end(self, token_bytes: int) -> int:
        """Return the byte of the file after the last token."""
        return self.tokens_at + token_bytes * self.num_tokens


class AdoptedShard(Shard):
    """What one file that others wrote gives to a split; `sha256` is that of these tokens, as they are stored."""

    name: Text  # below the link to the adopted folder
    num_bytes: Annotated[int, Field(ge=1, le=1 << 60)]
    stored: Annotated[str, Field(pattern=r"^([<>][iu][248]|\|[iu]1)$")]  # type of numpy
    members: Sequence[AdoptedMember] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_where_it_belongs(self) -> Self:
        check_below_link(self.name)
        return self

    @property
    def lengths_name(self) -> str:
        """The file of the shard folder that has the lengths of its documents."""
        return LENGTHS_NAME

    def stored_as(self, dtype: str) -> np.dtype[Any]:
        """Return the type in which the file holds token ids."""
        return np.dtype(self.stored)


class AdoptedIndex(_Frozen):
    """A file that others wrote, by which documents were found."""

    name: Text
    num_bytes: Count
    sha256: Digest

    @model_validator(mode="after")
    def _is_below_the_link(self) -> Self:
        check_below_link(self.name)
        return self


def check_below_link(name: str) -> None:
    """Check a path of a manifest.

    Raises:
        ValueError: It leads out of the adopted folder.
    """
    parts = PurePosixPath(name).parts
    if len(parts) < 2 or parts[0] != LINK_NAME or ".." in parts or "\0" in name:
        raise ValueError(f"{name} is not a path below {LINK_NAME}")


class SourceCount(_Frozen):
    """What one of several sources of a build gave."""

    name: Text
    num_documents: Count
    num_tokens: Count


class Manifest(_Frozen):
    """All that is known about a shard folder; nothing in it depends on the machine or the time of building.

    A field that is None is not written, so folders from before it existed keep their fingerprint.
    """

    format_version: Literal[1, 2] = 1
    dtype: Literal["uint16", "uint32"]
    tokenizer: Text
    tokenizer_hash: Text
    vocabulary: Annotated[int, Field(ge=1, le=1 << 32)]
    end_of_document: TokenId
    parse_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: Digest | None = None  # of shards in which there are chats
    largest_token: TokenId
    validation_share: Annotated[float, Field(ge=0, le=1)]
    source_files: Count
    source_bytes: Count
    source_listing: Text  # sha256 over names and sizes of the source files
    skipped_empty: Count
    skipped_binary: Count
    skipped_not_utf8: Count | None = None
    skipped_duplicates: Count | None = None
    skipped_rows: dict[Text, Count] | None = None  # that are no documents, by what is wrong
    sources: list[SourceCount] | None = None
    shards: Sequence[Shard] = Field(min_length=1)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        most = min(self.vocabulary, 1 << 8 * np.dtype(self.dtype).itemsize) - 1
        if max(self.largest_token, self.end_of_document) > most:
            raise ValueError(f"ids up to {most:,} as {self.dtype} of {self.vocabulary:,} ids, but larger ones named")
        if len({(shard.name, shard.split) for shard in self.shards}) < len(self.shards):
            raise ValueError("two shards of one name")
        for shard in self.shards:
            if beyond := shard.member_beyond(self.dtype):
                raise ValueError(f"member {beyond.key} of {shard.name} reaches beyond its {shard.num_bytes:,} bytes")
        return self

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 of the canonical manifest; through the shards' hashes it covers every token."""
        return fingerprint_of(self.content())

    def content(self) -> dict[str, Any]:
        """Return what is written and signed."""
        return {name: value for name, value in self.model_dump().items() if value is not None}

    def shards_of(self, split: Split) -> list[Shard]:
        """Return the shards of one split, in order."""
        return [shard for shard in self.shards if shard.split == split]

    def is_masked(self, split: Split) -> bool:
        """Tell whether some token of a split is only read."""
        return any(member.mask_at is not None for shard in self.shards_of(split) for member in shard.members)

    def num_tokens(self, split: Split) -> int:
        """Return the number of tokens in one split."""
        return sum(shard.num_tokens for shard in self.shards_of(split))

    def num_documents(self, split: Split) -> int:
        """Return the number of documents in one split."""
        return sum(shard.num_documents for shard in self.shards_of(split))


class AdoptedManifest(Manifest):
    """All that is known about a folder of tokens that others wrote; where it lies is a link beside the manifest."""

    format_version: Literal[2] = 2
    layout: Literal["megatron", "litdata", "npy"]
    documents_by: Literal["index", "eos", "bos"]
    shards: Sequence[AdoptedShard] = Field(min_length=1)
    indexes: list[AdoptedIndex]


def fingerprint_of(content: dict[str, Any]) -> str:
    """Return the sha256 of a manifest's content, written in one canonical way."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def manifest_text(manifest: Manifest) -> str:
    """Return the text of the manifest file, the fingerprint first."""
    return json.dumps({"fingerprint": manifest.fingerprint, **manifest.content()}, indent=1) + "\n"


def load_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a shard folder.

    Raises:
        DataError: There is none, or it is damaged, of another version, or changed since it was written.
    """
    content = _read_content(folder)
    version = content.get("format_version")
    if version not in (FORMAT_VERSION, ADOPTED_VERSION):
        raise DataError(
            f"the shards in {folder} must have format version {FORMAT_VERSION} or {ADOPTED_VERSION}",
            shown(repr(version)),
            "Build them again with `mtp data build`, or use the version of mtp_lightning that made them",
        )
    fingerprint = content.pop("fingerprint", None)
    actual = fingerprint_of(content)
    if actual != fingerprint:
        raise DataError(
            f"{folder / MANIFEST_NAME} must be as it was written, with fingerprint {shown(fingerprint)}",
            f"content with fingerprint {actual}",
            "Restore the file from its source, or build the shards again with `mtp data build`",
        )
    try:
        return (AdoptedManifest if version == ADOPTED_VERSION else Manifest).model_validate(content)
    except ValidationError as error:
        raise _damaged(folder, _said(error)) from error


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
    skipped |= manifest.skipped_rows or {}
    notes = [f"{count:,} {kind} skipped" for kind, count in skipped.items() if count]
    parts = [f"{train:,} documents and {held_out:,} held out", f"{num_tokens / 1e6:.2f} M tokens", *notes]
    return ", ".join(parts)


def _read_content(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(read_bounded(path, MOST_MANIFEST_BYTES))
    except FileNotFoundError as error:
        found = "a folder without one" if folder.is_dir() else "no such folder"
        raise DataError(
            f"a shard folder must have its manifest, {path}, which is written last",
            found,
            "Correct the path, or build the shards again with `mtp data build`",
        ) from error
    except OSError as error:
        raise _damaged(folder, str(error)) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, f"what is not JSON: {shown(error)}") from error
    if not isinstance(content, dict):
        raise _damaged(folder, f"a {type(content).__name__}")
    return content


def _said(error: ValidationError) -> str:
    """Return the first fault of a manifest: the field, what is wrong, and what is there."""
    first = error.errors(include_url=False)[0]
    place = shown(".".join(map(str, first["loc"])))
    wrong = f"{place}: " * bool(place) + first["msg"].removeprefix("Value error, ")
    return wrong if isinstance(first["input"], dict | BaseModel) else f"{wrong}, not {shown(repr(first['input']))}"


def _damaged(folder: Path, found: str) -> DataError:
    return DataError(
        f"{folder / MANIFEST_NAME} must be a manifest of shards",
        found,
        "Restore the file from its source, or build the shards again with `mtp data build`",
    )
