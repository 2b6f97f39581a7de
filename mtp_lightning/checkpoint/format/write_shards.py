"""Weights and moments as shards: every rank writes what it owns, in one format for every strategy.

Rank 2 of 4 writes `model-00002-of-00004.safetensors` and `optimizer-00002-of-00004.safetensors`. A parameter that
one rank holds whole is stored under its name in its shape; an interval of the flattened parameter is stored flat as
`NAME@START`. Moments are called `exp_avg/NAME` and `exp_avg/NAME@START`. Factors of moments, as Adafactor's
`row_var/NAME`, are stored in their own shapes, by a rank that holds the parameter whole. The text of `parameters` in a
file's metadata says of every parameter in it: the whole shape, the optimizer's step count, the kinds of its moments and
the shapes of factors.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, TypeAdapter
from torch import Tensor

from mtp_lightning.checkpoint.format.tensors import write_tensors
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.durable import FileRecord, durable_file

WEIGHT = "weight"
PARAMETERS_KEY = "parameters"  # in a file's metadata


AVERAGE = "average"  # kind of the moving average of a weight, kept among its moments


class Piece(NamedTuple):
    """An interval of a flattened parameter, with the optimizer's state of the same interval."""

    name: str  # as in `MtpModel.named_parameters`
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # first value of the flattened parameter that this piece holds
    weight: Tensor  # (P,) any float dtype
    moments: dict[str, Tensor]  # each (P,), e.g. exp_avg and exp_avg_sq; empty for a frozen parameter
    step: float | None  # the optimizer's step count of this parameter
    factors: Mapping[str, Tensor] = {}  # of moments, e.g. row_var (R, 1); only of a parameter that is held whole


class ParameterNote(BaseModel):
    """What a shard says of a parameter beside its values."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: tuple[int, ...]
    step: float | None
    kinds: tuple[str, ...]  # of moments and their factors
    factors: dict[str, tuple[int, ...]] = {}  # shapes of those kinds that are factors

    def shape_of(self, kind: str) -> tuple[int, ...]:
        """Shape of the weight or of a moment, that of the parameter, or of a factor, its own."""
        return self.factors.get(kind, self.shape)


NOTES = TypeAdapter(dict[str, ParameterNote])


def shard_name(part: str, rank: int, num_ranks: int) -> str:
    """Name the file that a rank (counted from 0) writes its `model` or `optimizer` part to.

    >>> shard_name("model", 1, 4)
    'model-00002-of-00004.safetensors'
    """
    return f"{part}-{rank + 1:05d}-of-{num_ranks:05d}.safetensors"


def write_pieces(folder: Path, pieces: Iterable[Piece], rank: int, num_ranks: int) -> dict[str, FileRecord]:
    """Write what a rank (counted from 0) owns into its two files and force them to disk.

    Beyond what the pieces hold, one tensor is copied to CPU memory at a time; digests are taken while writing.
    A rank that owns nothing writes files without tensors: what a checkpoint must hold follows from file names.

    Raises:
        CheckpointError: a piece does not fit its shape, or is given twice (nothing has been written then).
        OSError: the disk is full, or the folder cannot be written.
    """
    notes: dict[str, ParameterNote] = {}
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
    for piece in pieces:
        _check(piece)
        if piece.weight.numel() or not math.prod(piece.shape):
            notes[piece.name] = _note_on(piece)
            _add(parts["model"], "", piece, piece.weight)
            for kind, moment in piece.moments.items():
                _add(parts["optimizer"], f"{kind}/", piece, moment)
            parts["optimizer"] |= {f"{kind}/{piece.name}": factor for kind, factor in sorted(piece.factors.items())}
    metadata = {PARAMETERS_KEY: NOTES.dump_json(notes, exclude_defaults=True).decode()}
    records = {}
    for part, tensors in parts.items():
        name = shard_name(part, rank, num_ranks)
        with durable_file(folder / name) as file:
            records[name] = write_tensors(file, tensors, metadata)
    return records


def _note_on(piece: Piece) -> ParameterNote:
    kinds = tuple(sorted({*piece.moments, *piece.factors}))
    factors = {kind: tuple(factor.shape) for kind, factor in sorted(piece.factors.items())}
    return ParameterNote(shape=piece.shape, step=piece.step, kinds=kinds, factors=factors)


def _add(tensors: dict[str, Tensor], prefix: str, piece: Piece, values: Tensor) -> None:
    is_whole = values.numel() == math.prod(piece.shape)
    name = f"{prefix}{piece.name}" if is_whole else f"{prefix}{piece.name}@{piece.start}"
    if name in tensors:
        raise _misfit(piece, "given twice by one rank")
    tensors[name] = values.reshape(piece.shape) if is_whole else values


def _check(piece: Piece) -> None:
    numel, whole = piece.weight.numel(), math.prod(piece.shape)
    if not 0 <= piece.start <= piece.start + numel <= whole:
        raise _misfit(piece, f"{numel} values from {piece.start} on, of {whole}")
    for kind, values in {WEIGHT: piece.weight, **piece.moments}.items():
        if values.dim() != 1 or values.numel() != numel:
            raise _misfit(piece, f"{kind} of shape {list(values.shape)} beside {numel} values")
    if piece.factors and numel < whole:
        raise _misfit(piece, f"factors {', '.join(piece.factors)} beside {numel} values of {whole}")


def _misfit(piece: Piece, found: str) -> CheckpointError:
    return CheckpointError(
        "a piece of a parameter must be an interval of it, flat, with moments of the same length",
        f"{found}, for {piece.name} of shape {list(piece.shape)}",
        "Report this with the recipe: the strategy cuts parameters wrongly",
    )
