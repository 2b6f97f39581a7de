"""The manifest of a shard folder: what the shards hold, and the fingerprint that names these very tokens."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from mtp_lightning.errors import DataError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Member(_Frozen):
    """A run of whole documents in a shard: `KEY.tok` (token ids), `KEY.len` (document lengths), maybe `KEY.msk`.

    The mask has a byte per token: 1 where it may be a target, 0 where it is only read (a prompt). A member
    without one has targets only.
    """

    key: str
    tokens_at: int  # byte offset of the token ids in the shard file
    num_tokens: int
    tokens_crc32: int
    lengths_at: int  # byte offset of the document lengths in the shard file
    num_documents: int
    lengths_crc32: int
    mask_at: int | None = None  # byte offset of the loss mask in the shard file
    mask_crc32: int | None = None


class Shard(_Frozen):
    """One tar file."""

    name: str  # path inside the shard folder
    split: Split
    num_bytes: int
    sha256: str
    members: list[Member]

    @property
    def num_tokens(self) -> int:
        """Token ids in the shard, end-of-document included."""
        return sum(member.num_tokens for member in self.members)

    @property
    def num_documents(self) -> int:
        """Documents in the shard."""
        return sum(member.num_documents for member in self.members)


class SourceCount(_Frozen):
    """What one of several sources of a build gave."""

    name: str
    num_documents: int
    num_tokens: int


class Manifest(_Frozen):
    """All that is known about a shard folder; nothing in it depends on the machine or the time of building.

    A field that is None is not written, so folders from before it existed keep their fingerprint.
    """

    format_version: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    tokenizer: str
    tokenizer_hash: str
    vocabulary: int
    end_of_document: int
    largest_token: int
    validation_share: float
    source_files: int
    source_bytes: int
    source_listing: str  # sha256 over names and sizes of the source files
    skipped_empty: int
    skipped_binary: int
    skipped_not_utf8: int | None = None
    skipped_duplicates: int | None = None
    sources: list[SourceCount] | None = None
    shards: list[Shard]

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
    if version != FORMAT_VERSION:
        raise DataError(
            f"the shards in {folder} must have format version {FORMAT_VERSION}",
            repr(version),
            "Build them again with `mtp data build`, or use the version of mtp_lightning that made them",
        )
    fingerprint = content.pop("fingerprint", None)
    actual = fingerprint_of(content)
    if actual != fingerprint:
        raise DataError(
            f"{folder / MANIFEST_NAME} must be as it was written, with fingerprint {fingerprint}",
            f"content with fingerprint {actual}",
            "Restore the file from its source, or build the shards again with `mtp data build`",
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(folder, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _read_content(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST_NAME
    if not path.is_file():
        found = "a folder without one" if folder.is_dir() else "no such folder"
        raise DataError(
            f"a shard folder must have its manifest, {path}, which is written last",
            found,
            "Correct the path, or build the shards again with `mtp data build`",
        )
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(folder, f"{path.stat().st_size} bytes that are not JSON: {error}") from error
    if not isinstance(content, dict):
        raise _damaged(folder, f"a {type(content).__name__}")
    return content


def _damaged(folder: Path, found: str) -> DataError:
    return DataError(
        f"{folder / MANIFEST_NAME} must be a manifest of shards",
        found,
        "Restore the file from its source, or build the shards again with `mtp data build`",
    )
