"""Small corpora and the slow way to cut them into rows, for comparison."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mtp_lightning.data.shards.build import BuildOptions, build_shards
from mtp_lightning.data.shards.index import write_index
from mtp_lightning.data.shards.manifest import Manifest, fingerprint_of
from mtp_lightning.recipe.schema.root import Recipe

END = 256


def write_corpus(folder: Path, *, num_documents: int = 40, seed: int = 0) -> dict[str, bytes]:
    """Write files of 1 to 90 random bytes in two levels of folders; return them by relative path, in path order."""
    rng = np.random.default_rng(seed)
    documents = {}
    for number in range(num_documents):
        name = f"{'abc'[number % 3]}/{number:03d}.txt"
        documents[name] = rng.integers(1, 256, size=rng.integers(1, 91), dtype=np.uint8).tobytes()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(documents[name])
    return dict(sorted(documents.items()))


def build_tiny(
    sources: list[str], out: Path, *, show_progress: bool = False, processes: int = 1, **changes: Any
) -> Manifest:
    """Build with members and shards so small that a few documents fill several."""
    options: dict[str, Any] = {"validation_fraction": 0.3, "member_tokens": 100, "shard_bytes": 4000}
    return build_shards(
        sources, out, BuildOptions(**{**options, **changes}), processes=processes, show_progress=show_progress
    )


def is_held_out(name: str, share: float) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) / 16**12 < share


def rows_by_hand(
    documents: list[bytes], manifest: Manifest, split: str, *, seq_len: int, num_offsets: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Concatenate the documents of each shard and cut: token by token, no arrays."""
    rows, numbers = [], []
    left = iter(documents)
    for shard in manifest.shards:
        if shard.split != split:
            continue
        tokens: list[int] = []
        owners: list[int] = []
        for document in range(sum(member.num_documents for member in shard.members)):
            ids = [*next(left), END]
            tokens += ids
            owners += [document] * len(ids)
        begin = 0
        while begin + seq_len + num_offsets <= len(tokens):
            end = begin + seq_len + num_offsets
            rows.append(tokens[begin:end])
            numbers.append([owner - owners[begin] for owner in owners[begin:end]])
            begin += seq_len
    assert next(left, None) is None
    return rows, numbers


def tiny_recipe(cache: Path, corpus: Path, **changes: dict[str, Any]) -> Recipe:
    """A recipe over a tiny corpus; keyword arguments change fields of its sections."""
    sections: dict[str, dict[str, Any]] = {
        "heads": {"num_offsets": 3},
        "data": {"corpus": [str(corpus)], "seq_len": 8, "validation_fraction": 0.3},
        "batch": {"global_batch_size": 8, "micro_batch_size": 4},
        "run": {"cache": str(cache), "seed": 5, "validation_samples": 10, "device": "cpu"},
    }
    for name, fields in changes.items():
        sections[name] = {**sections.get(name, {}), **fields}
    return Recipe.model_validate(sections)


def forge(folder: Path, **changes: Any) -> None:
    """Sign a folder again after its shards or its manifest have been changed, as a broken builder might have."""
    content = json.loads((folder / "manifest.json").read_text())
    del content["fingerprint"]
    content.update(changes)
    for shard in content["shards"]:
        data = (folder / shard["name"]).read_bytes()
        shard["sha256"] = hashlib.sha256(data).hexdigest()
        for member in shard["members"]:
            for part, size in (("tokens", 2 * member["num_tokens"]), ("lengths", 4 * member["num_documents"])):
                at = member[f"{part}_at"]
                member[f"{part}_crc32"] = zlib.crc32(data[at : at + size])
    (folder / "manifest.json").write_text(json.dumps({"fingerprint": fingerprint_of(content), **content}))
    write_index(folder, Manifest.model_validate(content))
