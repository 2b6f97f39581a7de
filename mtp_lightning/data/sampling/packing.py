"""Rows filled with whole documents by best fit [Ding et al. 2024], after a plan that is made once and stored."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
from numpy.typing import NDArray

from mtp_lightning.console.progress import say
from mtp_lightning.data.sampling.windows import RowArrays, SequenceSource
from mtp_lightning.data.shards.arrays import arrays_of
from mtp_lightning.data.shards.manifest import Manifest, Shard, Split, load_manifest
from mtp_lightning.data.shards.mapped import Integers, ShardMaps
from mtp_lightning.errors import DataError, refusal_of
from mtp_lightning.files.durable import finished_file
from mtp_lightning.files.untrusted import shown

PLAN_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What each row is filled with: pieces of documents, row after row."""

    first_pieces: Integers  # per row, and one more: where its pieces begin
    shards: Integers  # per piece: place of its shard in the split
    starts: Integers  # per piece: first token in the shard
    lengths: Integers  # per piece: tokens, with the tail that only serves as targets


@dataclass(frozen=True)
class _Pieces:
    shards: Integers
    starts: Integers
    lengths: Integers


def plan_packing(maps: ShardMaps, *, seq_len: int, num_offsets: int) -> Plan:
    """Plan rows of T + n tokens: every pair of a token and a target of the documents lies in exactly one row, once.

    A document of more than T tokens gives rows of its own, T tokens each and up to n more as targets. What is left
    of it, and every shorter document, goes whole into the row with the least room that still holds it, longest first.

    Cost: about 2 us per document, and 24 bytes of the plan.
    """
    places = [maps[place].document_places() for place in range(len(maps.shards))]
    shards = np.repeat(np.arange(len(places)), [starts.size for starts, _ in places])
    starts = np.concatenate([np.array([], dtype=np.int64), *(starts for starts, _ in places)])
    lengths = np.concatenate([np.array([], dtype=np.int64), *(own for _, own in places)])
    full, rest = _cut(_Pieces(shards, starts, lengths), seq_len, num_offsets)
    rows = np.concatenate([np.arange(full.lengths.size), full.lengths.size + _best_fit(rest.lengths, seq_len)])
    order = np.argsort(rows, kind="stable")
    num_rows = int(rows.max(initial=-1)) + 1
    return Plan(
        first_pieces=np.searchsorted(rows[order], np.arange(num_rows + 1)),
        shards=np.concatenate([full.shards, rest.shards])[order],
        starts=np.concatenate([full.starts, rest.starts])[order],
        lengths=np.concatenate([full.lengths, rest.lengths])[order],
    )


def plan_path(cache: Path, manifest: Manifest, split: Split, *, seq_len: int, num_offsets: int) -> Path:
    """Return where the plan of a split is kept."""
    return cache / f"packing-{manifest.fingerprint[:16]}-{split}-T{seq_len}-n{num_offsets}.npz"


def prepare_plan(folder: Path, split: Split, cache: Path, *, seq_len: int, num_offsets: int) -> None:
    """Make the plan of a split unless it is there, and say how well it fills the rows."""
    path = plan_path(cache, load_manifest(folder), split, seq_len=seq_len, num_offsets=num_offsets)
    if path.exists():
        return
    maps = ShardMaps(folder, split)
    plan = plan_packing(maps, seq_len=seq_len, num_offsets=num_offsets)
    _write(path, plan)
    num_rows = plan.first_pieces.size - 1
    num_tokens = int(np.minimum(plan.lengths, seq_len).sum())
    filled = num_tokens / max(1, num_rows * seq_len)
    say(f"packed {split} into {num_rows:,} rows of {seq_len:,} tokens, {filled:.2%} full: {path}", stderr=True)


@final
class PackedRows(SequenceSource):
    """Rows as a plan packs them: documents one after another, then padding that is never a target.

    Padding is a document of its own, of end-of-document ids.
    """

    def __init__(self, folder: Path, split: Split, cache: Path, *, seq_len: int, num_offsets: int) -> None:
        """Open a shard folder and the plan that `prepare_plan` made.

        Raises:
            DataError: The folder or the plan is damaged or missing.
        """
        self.split = split
        self.width_tokens = seq_len + num_offsets
        self._maps = ShardMaps(folder, split)
        shape = {"seq_len": seq_len, "num_offsets": num_offsets}
        path = plan_path(cache, self._maps.manifest, split, **shape)
        self._plan = _read(path)
        wrong = _wrong_with(self._plan, self._maps.shards, self.width_tokens)
        if wrong:
            raise _damaged(path, wrong)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._plan.first_pieces.size - 1

    @property
    def manifests(self) -> list[Manifest]:
        """What the folder holds."""
        return [self._maps.manifest]

    def read(self, rows: Integers) -> RowArrays:
        """Read rows; the mask is false for padding, and for tokens that are only read."""
        self.refuse_outside(rows)
        shape = (rows.size, self.width_tokens)
        manifest = self._maps.manifest
        tokens = np.full(shape, manifest.end_of_document, dtype=manifest.dtype)  # (B, T+n)
        documents = np.zeros(shape, dtype=np.int32)
        mask = np.zeros(shape, dtype=np.bool_)
        for line, row in enumerate(rows):
            end = 0
            first, last = self._plan.first_pieces[row : row + 2]
            for number, piece in enumerate(range(first, last)):
                shard = self._maps[int(self._plan.shards[piece])]
                start, length = self._plan.starts[piece : piece + 1], int(self._plan.lengths[piece])
                begin, end = end, end + length
                tokens[line, begin:end] = shard.tokens(start, length)[0]
                mask[line, begin:end] = shard.loss_mask(start, length)[0]
                documents[line, begin:end] = number
            documents[line, end:] = last - first
        return {"tokens": tokens, "documents": documents, "loss_mask": mask}

    def describe(self, row: int) -> str:
        """Return the places of the row's documents in words."""
        first, last = (int(bound) for bound in self._plan.first_pieces[row : row + 2])
        names = []
        for piece in range(first, last):
            place = int(self._plan.shards[piece])
            start, length = int(self._plan.starts[piece]), int(self._plan.lengths[piece])
            names.append(f"{self._maps[place].describe(start, self._maps.shards[place].name)}: {length:,} tokens")
        return "\n".join(names)

    def place(self, row: int, position: int) -> str:
        """Return the place of one token of a row in words; padding has none."""
        first, last = (int(bound) for bound in self._plan.first_pieces[row : row + 2])
        ends = np.cumsum(self._plan.lengths[first:last])
        piece = first + int(np.searchsorted(ends, position, side="right"))
        begin = int(ends[piece - first] - self._plan.lengths[piece])
        return self._maps.describe(int(self._plan.shards[piece]), int(self._plan.starts[piece]) + position - begin)


def _cut(documents: _Pieces, seq_len: int, num_offsets: int) -> tuple[_Pieces, _Pieces]:
    """Cut documents into windows with their tails of targets, and what is left; one token alone has no target."""
    num_full = (documents.lengths - 1) // seq_len
    whose = np.repeat(np.arange(num_full.size), num_full)
    done = (np.arange(whose.size) - np.repeat(np.cumsum(num_full) - num_full, num_full)) * seq_len
    left = documents.lengths[whose] - done
    full = _Pieces(documents.shards[whose], documents.starts[whose] + done, np.minimum(left, seq_len + num_offsets))
    rest = documents.lengths - num_full * seq_len
    has_rest = rest > 1
    return full, _Pieces(documents.shards[has_rest], (documents.starts + num_full * seq_len)[has_rest], rest[has_rest])


def _best_fit(lengths: Integers, room_tokens: int) -> Integers:
    """Return the row of each piece: longest first, into the row with the least room that holds it, else a new one."""
    rows = np.empty(lengths.size, dtype=np.int64)
    rows_by_room: list[list[int]] = [[] for _ in range(room_tokens + 1)]
    rooms = 0  # bit r is set where some row has room for exactly r tokens
    num_rows = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_room[room].pop()
            rooms ^= 0 if rows_by_room[room] else 1 << room
        else:
            row, room = num_rows, room_tokens
            num_rows += 1
        rows[piece] = row
        rows_by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def _write(path: Path, plan: Plan) -> None:
    try:
        with finished_file(path) as file:
            np.savez(file, allow_pickle=False, checksum=_checksum(plan), **vars(plan))
    except OSError as error:
        raise DataError(
            f"the folder of the packing plan {path} must be writable",
            refusal_of(error, path),
            "See to space and rights, or set run.cache",
        ) from error


def _read(path: Path) -> Plan:
    names = tuple(Plan.__dataclass_fields__)
    try:
        arrays = arrays_of(path, ("checksum", *names))
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {shown(error)}") from error
    if any(arrays[name].dtype != np.int64 for name in names):
        raise _damaged(path, "numbers of another type")
    plan = Plan(**{name: arrays[name].astype(np.int64, copy=False) for name in names})
    if not np.array_equal(arrays["checksum"], _checksum(plan)):
        raise _damaged(path, "other content than was written")
    return plan


def _wrong_with(plan: Plan, shards: Sequence[Shard], width_tokens: int) -> str | None:
    """Say what a plan asks for that the shards or the rows lack."""
    first, lengths = plan.first_pieces, plan.lengths
    if not plan.shards.size == plan.starts.size == lengths.size:
        return "pieces without a shard, a start or a length"
    if not first.size or first[0] != 0 or first[-1] != lengths.size or (np.diff(first) < 1).any():
        return "rows of other pieces than there are"
    if not lengths.size:
        return None
    if plan.shards.min() < 0 or plan.shards.max() >= len(shards):
        return "a piece of a shard that there is not"
    sizes = np.array([shard.num_tokens for shard in shards], dtype=np.int64)[plan.shards]
    if (
        min(lengths.min(), plan.starts.min() + 1) < 1
        or (lengths > width_tokens).any()
        or (plan.starts > sizes - lengths).any()
    ):
        return "a piece that reaches out of its shard or its row"
    return "a row that overflows" if (np.add.reduceat(lengths, first[:-1]) > width_tokens).any() else None


def _checksum(plan: Plan) -> NDArray[np.uint8]:
    digest = hashlib.sha256(f"packing {PLAN_VERSION}".encode())
    for array in vars(plan).values():
        digest.update(np.ascontiguousarray(array).data)
    return np.frombuffer(digest.digest(), dtype=np.uint8)


def _damaged(path: Path, found: str) -> DataError:
    return DataError(f"{path} must be a plan of packed rows", found, "Remove it, and it is made again")
