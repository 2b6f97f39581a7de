"""Verify shards: every byte and every promise, read twice, by offset and by stock webdataset."""

import hashlib
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import group_by_keys, tar_file_expander

from mtp_lightning.console.progress import say
from mtp_lightning.data.shards.index import load_index
from mtp_lightning.data.shards.integrity import MemberChecks, check_document_lengths, check_written, wrong_shard
from mtp_lightning.data.shards.manifest import AdoptedShard, Manifest, Member, Shard, load_manifest
from mtp_lightning.data.shards.mapped import bytes_of, check_sizes
from mtp_lightning.data.shards.tar_members import TarDamage, members_of
from mtp_lightning.files.untrusted import shown

Bytes = NDArray[np.uint8]


def verify_shards(folder: Path) -> Manifest:
    """Check a shard folder to the last byte, say one line per shard, and return its manifest.

    Checked are: sizes and hashes; that the index says what the manifest says; that stock webdataset reads the
    very members that the offsets name; that every token id is below the vocabulary; that lengths add up to the
    tokens; that every document ends with end-of-document; that a loss mask is of zeros and ones.

    Raises:
        DataError: The first thing that does not hold, with shard, member and byte offset.
    """
    manifest = load_manifest(folder)
    check_sizes(folder, manifest)
    load_index(folder, manifest)
    for shard in manifest.shards:
        bytes_of_shard = bytes_of(folder / shard.name)
        if isinstance(shard, AdoptedShard):
            _check_adopted(folder, bytes_of_shard, shard, manifest)
            continue
        _check_hash(bytes_of_shard, shard, manifest)
        _check_reading(folder, bytes_of_shard, shard, manifest)
        for member in shard.members:
            _check_tokens(bytes_of_shard, shard, member, manifest)
            _check_mask(bytes_of_shard, shard, member)
        say(f"ok  {shard.name}: {shard.num_documents:,} documents, {shard.num_tokens:,} tokens")
    say(f"ok  {folder}: {len(manifest.shards):,} shards, fingerprint {manifest.fingerprint}")
    return manifest


def _check_adopted(folder: Path, bytes_of_shard: Bytes, shard: AdoptedShard, manifest: Manifest) -> None:
    """Check the tokens and lengths of a file that others wrote."""
    lengths, stored = bytes_of(folder / shard.lengths_name), np.dtype(shard.stored)
    origin = str(folder / shard.name)
    checks = MemberChecks(shard, bytes_of_shard, origin, token_bytes=stored.itemsize, lengths=lengths)
    checks.lengths()
    digest = hashlib.sha256()
    for number, member in enumerate(shard.members):
        checks.check_tokens(np.array([number]), np.array([number]))
        content = bytes_of_shard[member.tokens_at : member.end(stored.itemsize)]
        digest.update(content.data)
        tokens = content.view(stored)
        if tokens.min() < 0 or tokens.max() >= manifest.vocabulary:
            expected = f"token ids of {origin}, member {number:,}, must be in [0, {manifest.vocabulary:,})"
            raise wrong_shard(expected, f"{tokens.min():,} to {tokens.max():,}")
    if digest.hexdigest() != shard.sha256:
        raise wrong_shard(f"the tokens of {origin} must have sha256 {shard.sha256}", digest.hexdigest())
    say(f"ok  {shard.name}, {shard.split}: {shard.num_documents:,} documents, {shard.num_tokens:,} tokens")


def _check_hash(bytes_of_shard: Bytes, shard: Shard, manifest: Manifest) -> None:
    found = hashlib.sha256(bytes_of_shard.data).hexdigest()
    if found == shard.sha256:
        return
    for member in shard.members:
        tokens, lengths = _payloads(bytes_of_shard, member, manifest)
        check_written(tokens, member.tokens_crc32, _place(shard, member, ".tok", member.tokens_at))
        check_written(lengths, member.lengths_crc32, _place(shard, member, ".len", member.lengths_at))
        mask = _mask(bytes_of_shard, member)
        if mask is not None:
            check_written(mask, member.mask_crc32, _place(shard, member, ".msk", member.mask_at or 0))
    raise wrong_shard(f"{shard.name} must have sha256 {shard.sha256}", f"{found}, by a tar header or padding")


def _check_reading(folder: Path, bytes_of_shard: Bytes, shard: Shard, manifest: Manifest) -> None:
    _check_tar(folder, shard)
    with (folder / shard.name).open("rb") as stream:
        samples = group_by_keys(tar_file_expander([{"url": shard.name, "stream": stream}]))
        for member, sample in itertools.zip_longest(shard.members, samples, fillvalue=None):
            if member is None or sample is None or sample["__key__"] != member.key:
                wanted = "no more members" if member is None else f"member {member.key}"
                found = "none" if sample is None else f"member {shown(sample['__key__'])}"
                raise wrong_shard(f"webdataset must find {wanted} in {shard.name}", found)
            tokens, lengths = _payloads(bytes_of_shard, member, manifest)
            mask = _mask(bytes_of_shard, member)
            wanted_bytes = (tokens.tobytes(), lengths.tobytes(), None if mask is None else mask.tobytes())
            if (sample.get("tok"), sample.get("len"), sample.get("msk")) != wanted_bytes:
                place = _place(shard, member, "", member.tokens_at)
                raise wrong_shard(f"webdataset must read what lies at {place}", "other bytes")


def _check_tar(folder: Path, shard: Shard) -> None:
    """Check that the tar is whole, which stock webdataset takes for granted."""
    try:
        with (folder / shard.name).open("rb") as stream:
            names = [name for name, _ in members_of(stream, lambda name: False, shard.num_bytes)]
    except TarDamage as error:
        raise wrong_shard(f"{shard.name} must be a whole tar", str(error)) from error
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise wrong_shard(f"the members of {shard.name} must have names of their own", f"{shown(twice)} twice")


def _check_tokens(bytes_of_shard: Bytes, shard: Shard, member: Member, manifest: Manifest) -> None:
    payload, lengths = _payloads(bytes_of_shard, member, manifest)
    tokens = payload.view(np.dtype(manifest.dtype).newbyteorder("<"))
    check_document_lengths(lengths.view("<u4"), tokens.size, _place(shard, member, ".len", member.lengths_at))
    ends = np.cumsum(lengths.view("<u4"), dtype=np.int64)
    too_large = np.flatnonzero(tokens >= manifest.vocabulary)
    if too_large.size:
        at = int(too_large[0])
        place = _place(shard, member, ".tok", member.tokens_at + at * tokens.itemsize)
        raise wrong_shard(f"the token id at {place} must be below {manifest.vocabulary:,}", f"{tokens[at]:,}")
    if manifest.chat_template:
        return  # a chat ends as its template ends it
    unended = ends[tokens[ends - 1] != manifest.end_of_document]
    if unended.size:
        at = int(unended[0]) - 1
        place = _place(shard, member, ".tok", member.tokens_at + at * tokens.itemsize)
        raise wrong_shard(f"a document must end with id {manifest.end_of_document} at {place}", f"id {tokens[at]}")


def _check_mask(bytes_of_shard: Bytes, shard: Shard, member: Member) -> None:
    mask = _mask(bytes_of_shard, member)
    wrong = np.flatnonzero(mask > 1) if mask is not None else np.array([])
    if mask is not None and wrong.size:
        at = int(wrong[0])
        place = _place(shard, member, ".msk", (member.mask_at or 0) + at)
        raise wrong_shard(f"the loss mask at {place} must be 0 or 1", str(mask[at]))


def _mask(bytes_of_shard: Bytes, member: Member) -> Bytes | None:
    """Return the bytes of a member's loss mask, if it has one."""
    return None if member.mask_at is None else bytes_of_shard[member.mask_at : member.mask_at + member.num_tokens]


def _payloads(bytes_of_shard: Bytes, member: Member, manifest: Manifest) -> tuple[Bytes, Bytes]:
    """Return the bytes of a member's token ids and of its document lengths."""
    num_bytes = member.num_tokens * np.dtype(manifest.dtype).itemsize
    tokens = bytes_of_shard[member.tokens_at : member.tokens_at + num_bytes]
    return tokens, bytes_of_shard[member.lengths_at : member.lengths_at + 4 * member.num_documents]


def _place(shard: Shard, member: Member, suffix: str, at: int) -> str:
    return f"{shard.name}, member {member.key}{suffix}, byte {at:,}"
