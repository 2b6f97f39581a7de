"""Reading shards: any interval of any parameter, whoever wrote it."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, final

import torch
from torch import Tensor

from mtp_lightning.checkpoint.format.manifest import DamagedCheckpointError
from mtp_lightning.checkpoint.format.tensors import BLOCK_BYTES, Entry, Header, read_header, read_into
from mtp_lightning.checkpoint.format.write_shards import (
    AVERAGE,
    NOTES,
    PARAMETERS_KEY,
    WEIGHT,
    ParameterNote,
    shard_name,
)
from mtp_lightning.errors import CheckpointError

MOST_NAMES = 8
WHOLE_MODEL = "model.safetensors"  # all weights in one file: an exported folder
_SHARD = re.compile(r"(model|optimizer)-(\d{5,})-of-(\d{5,})\.safetensors")


class _Extent(NamedTuple):
    """Values of a parameter that lie in one run of bytes."""

    start: int
    stop: int
    path: Path
    entry: Entry


@final
class ShardReader:
    """Weights and moments of a checkpoint folder (or weights of an exported one); only headers are in memory.

    Attributes:
        folder: where the shards lie.
        names: every parameter, in the order of the files.
    """

    def __init__(self, folder: Path, *, averaged: bool = False) -> None:
        """Read the headers of a folder's shards.

        Args:
            folder: where the shards lie.
            averaged: show the moving average of every trained parameter as its weight.

        Raises:
            CheckpointError: there is no average.
            DamagedCheckpointError: a shard is missing, shards contradict each other, or they do not hold every value
                of every parameter exactly once; names the parameter, the values and the files.
        """
        self.folder = folder
        self._notes: dict[str, ParameterNote] = {}
        self._extents: dict[tuple[str, str], list[_Extent]] = {}
        for path in _shards_in(folder):
            self._take(path)
        self.names = tuple(self._notes)
        for name, note in self._notes.items():
            for kind in (WEIGHT, *note.kinds):
                self._check_cover(name, kind)
        if averaged:
            self._show_averages()

    def _show_averages(self) -> None:
        averages = {name: extents for (name, kind), extents in self._extents.items() if kind == AVERAGE}
        if not averages:
            raise CheckpointError(
                "--weights ema needs a checkpoint of a run with optimizer.ema, after its optimizer.ema.from_step",
                f"no average of the weights in {self.folder}",
                "Leave --weights out, or name the run itself: an exported folder holds one kind of weights",
            )
        self._extents |= {(name, WEIGHT): extents for name, extents in averages.items()}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self._note(name).shape

    def numel(self, name: str) -> int:
        """Number of values of the whole parameter."""
        return math.prod(self.shape(name))

    def shape_of(self, name: str, kind: str) -> tuple[int, ...]:
        """Shape of the weight or of a moment, that of the whole parameter, or of a factor of a moment, its own."""
        return self._note(name).shape_of(kind)

    def step(self, name: str) -> float | None:
        """Step count that the optimizer keeps of a parameter; None where it keeps none."""
        return self._note(name).step

    def kinds(self, name: str) -> tuple[str, ...]:
        """What can be read of a parameter: `weight`, and the names of its moments; none where it is frozen."""
        return (WEIGHT, *self._note(name).kinds)

    def dtype(self, name: str, kind: str = WEIGHT) -> torch.dtype:
        """Type in which values are stored."""
        return self._extents_of(name, kind)[0].entry.dtype

    def read(self, name: str, kind: str = WEIGHT, start: int = 0, stop: int | None = None) -> Tensor:
        """Read an interval of a flattened parameter or moment: (stop - start,) in CPU memory, as stored.

        Only the bytes of the interval are read.

        Raises:
            CheckpointError: the checkpoint does not hold this parameter or kind.
        """
        extents, numel = self._extents_of(name, kind), math.prod(self.shape_of(name, kind))
        stop = numel if stop is None else stop
        if not 0 <= start <= stop <= numel:
            raise IndexError(f"{name}[{start}:{stop}] of {numel} values")
        values = torch.empty(stop - start, dtype=self.dtype(name, kind))
        for extent in extents:
            first, last = max(start, extent.start), min(stop, extent.stop)
            if first < last:
                position = extent.entry.begin + (first - extent.start) * values.element_size()
                with extent.path.open("rb") as file:
                    read_into(values[first - start : last - start], file, position)
        return values

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Read a parameter's weight in consecutive blocks of at most 4 MiB; yields each with its first value."""
        length = BLOCK_BYTES // self.dtype(name).itemsize
        for start in range(0, self.numel(name), length):
            yield start, self.read(name, WEIGHT, start, min(start + length, self.numel(name)))

    def _take(self, path: Path) -> None:
        """Take in the header of one file."""
        header = read_header(path)
        if path.name == WHOLE_MODEL:
            notes = {
                name: ParameterNote(shape=entry.shape, step=None, kinds=()) for name, entry in header.entries.items()
            }
        else:
            notes = _parse_notes(header, path)
        for name, note in notes.items():
            self._describe(name, note, path)
        is_model = path.name.startswith("model")
        for stored, entry in header.entries.items():
            kind, _, cut = (WEIGHT, "", stored) if is_model else stored.partition("/")
            name, start = _split(cut, notes)
            if name not in notes or (cut in notes and entry.shape != notes[name].shape_of(kind)):
                raise _damaged(f"{stored} of shape {list(entry.shape)}, of which its notes know nothing, in {path}")
            extent = _Extent(start, start + (entry.end - entry.begin) // entry.dtype.itemsize, path, entry)
            self._extents.setdefault((name, kind), []).append(extent)

    def _describe(self, name: str, note: ParameterNote, path: Path) -> None:
        known = self._notes.setdefault(name, note)
        if known != note:
            others = _listed([extent.path.name for extent in self._extents.get((name, WEIGHT), [])])
            raise _damaged(f"{name} with {_words(note)} in {path}, but with {_words(known)} in {others}")

    def _check_cover(self, name: str, kind: str) -> None:
        """Check that a parameter's extents hold every value once, all in one type."""
        extents = self._extents.setdefault((name, kind), [])
        extents.sort(key=lambda extent: (extent.start, extent.stop))
        files = _listed([extent.path.name for extent in extents])
        position, former, numel = 0, "", math.prod(self.shape_of(name, kind))
        for extent in extents:
            if extent.start > position:
                raise _damaged(f"no {kind} of {name}[{position}:{extent.start}] in {files} of {self.folder}")
            if extent.start < position:
                both = f"{former} and {extent.path.name}"
                raise _damaged(f"{kind} of {name}[{extent.start}:{position}] in both {both} of {self.folder}")
            position, former = extent.stop, extent.path.name
        if position < numel or not extents:
            raise _damaged(f"no {kind} of {name}[{position}:{numel}] in {files} of {self.folder}")
        if position > numel:
            raise _damaged(f"{kind} of {name}[{numel}:{position}], which has {numel} values, in {former}")
        if len({extent.entry.dtype for extent in extents}) > 1:
            raise _damaged(f"{kind} of {name} in several types in {files} of {self.folder}")

    def _note(self, name: str) -> ParameterNote:
        if name not in self._notes:
            raise self._lacking(name)
        return self._notes[name]

    def _extents_of(self, name: str, kind: str) -> list[_Extent]:
        if (name, kind) not in self._extents:
            raise self._lacking(f"{kind} of {name}")
        return self._extents[name, kind]

    def _lacking(self, what: str) -> CheckpointError:
        return CheckpointError(
            "a checkpoint must hold what the model and its optimizer need",
            f"no {what} in {self.folder}",
            "Use a checkpoint of the same recipe",
        )


def _shards_in(folder: Path) -> list[Path]:
    """List a folder's shards, models first; every rank's two files must be there."""
    found = [match for path in sorted(folder.iterdir()) if (match := _SHARD.fullmatch(path.name))]
    if not found and (folder / WHOLE_MODEL).is_file():
        return [folder / WHOLE_MODEL]
    counts = sorted({int(match[3]) for match in found})
    if len(counts) != 1:
        raise _damaged(f"shards of {' and of '.join(map(str, counts)) or 'no'} ranks in {folder}")
    names = [shard_name(part, rank, counts[0]) for part in ("model", "optimizer") for rank in range(counts[0])]
    for name in names:
        if not (folder / name).is_file():
            raise _damaged(f"no {name} in {folder}")
    return [folder / name for name in names]


def _parse_notes(header: Header, path: Path) -> dict[str, ParameterNote]:
    try:
        return NOTES.validate_json(header.metadata[PARAMETERS_KEY])
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(f"no notes on its parameters ({type(error).__name__}) in {path}") from None


def _split(cut: str, notes: dict[str, ParameterNote]) -> tuple[str, int]:
    """Split the name of a stored tensor into the parameter's name and the first value."""
    if cut in notes:
        return cut, 0
    name, _, start = cut.rpartition("@")
    return (name, int(start)) if start.isdecimal() else (cut, 0)


def _listed(names: list[str]) -> str:
    distinct = list(dict.fromkeys(names))
    shown = distinct[:MOST_NAMES]
    return ", ".join(shown or ["any shard"]) + (f" and {len(distinct) - len(shown)} more" if shown != distinct else "")


def _words(note: ParameterNote) -> str:
    return f"shape {list(note.shape)}, step {note.step} and moments {list(note.kinds)}" + (
        f", factors {note.factors}" if note.factors else ""
    )


def _damaged(found: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        "the shards of a checkpoint must hold every value of every parameter exactly once",
        found,
        "Use another checkpoint",
    )
