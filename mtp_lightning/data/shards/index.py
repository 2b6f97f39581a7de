"""The binary index of a shard folder: where every member lies, as arrays."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mtp_lightning.data.shards.arrays import arrays_of
from mtp_lightning.data.shards.integrity import wrong_shard
from mtp_lightning.data.shards.manifest import Manifest
from mtp_lightning.errors import DataError
from mtp_lightning.files.untrusted import shown

INDEX_NAME = "index.npz"
MOST_INDEX_BYTES = 256 << 20  # 48 bytes for each member of the largest manifest
Offsets = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Index:
    """One entry per member, in the order of the manifest."""

    shard: Offsets  # number of the shard in the manifest
    tokens_at: Offsets
    num_tokens: Offsets
    lengths_at: Offsets
    num_documents: Offsets
    mask_at: Offsets  # -1 for a member without a mask


def build_index(manifest: Manifest) -> Index:
    """Gather the places of all members from the manifest."""
    members = [(number, member) for number, shard in enumerate(manifest.shards) for member in shard.members]
    return Index(
        shard=_offsets([number for number, _ in members]),
        tokens_at=_offsets([member.tokens_at for _, member in members]),
        num_tokens=_offsets([member.num_tokens for _, member in members]),
        lengths_at=_offsets([member.lengths_at for _, member in members]),
        num_documents=_offsets([member.num_documents for _, member in members]),
        mask_at=_offsets([-1 if member.mask_at is None else member.mask_at for _, member in members]),
    )


def write_index(folder: Path, manifest: Manifest) -> None:
    """Write the index beside the manifest, bound to it by its fingerprint."""
    fingerprint = np.frombuffer(bytes.fromhex(manifest.fingerprint), dtype=np.uint8)
    np.savez(folder / INDEX_NAME, allow_pickle=False, fingerprint=fingerprint, **vars(build_index(manifest)))


def load_index(folder: Path, manifest: Manifest) -> Index:
    """Read the index of a shard folder, and check it against the manifest: what it says becomes places in files.

    Raises:
        DataError: It is missing, damaged or belongs to another manifest.
    """
    path, names = folder / INDEX_NAME, tuple(Index.__dataclass_fields__)
    try:
        arrays = arrays_of(path, ("fingerprint", *names))
    except (OSError, ValueError) as error:
        raise _wrong(path, manifest, f"{type(error).__name__}: {shown(error)}") from error
    fingerprint = shown(arrays["fingerprint"].tobytes().hex())
    if fingerprint != manifest.fingerprint:
        raise _wrong(path, manifest, f"the index of fingerprint {fingerprint}")
    index = build_index(manifest)
    for name, wanted in vars(index).items():
        if arrays[name].dtype != wanted.dtype or not np.array_equal(arrays[name], wanted):
            raise wrong_shard(f"{name} in the index of {folder} must be as in the manifest", "other numbers")
    return index


def _wrong(path: Path, manifest: Manifest, found: str) -> DataError:
    return DataError(
        f"{path} must be the index of the manifest beside it, fingerprint {manifest.fingerprint}",
        found,
        "Restore the file from its source, or build the shards again with `mtp data build`",
    )


def _offsets(values: list[int]) -> Offsets:
    return np.array(values, dtype=np.int64)
