"""Trained heads put back into a copy of the folder that they came with; every other byte stays as it is."""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, final

import torch
from torch import Tensor

from mtp_lightning.checkpoint.convert.load_model import check_tensors
from mtp_lightning.checkpoint.export.contents import Source
from mtp_lightning.checkpoint.export.formats import FORMATS
from mtp_lightning.checkpoint.export.names import FormatName
from mtp_lightning.checkpoint.export.rewritten import read_whole
from mtp_lightning.checkpoint.export.trunk import sources_of
from mtp_lightning.checkpoint.export.write import PARITY, REPORT, Check, json_bytes, warn_of_untrained
from mtp_lightning.checkpoint.format.folder import open_checkpoint
from mtp_lightning.checkpoint.format.reader_view import WeightSource
from mtp_lightning.checkpoint.format.tensors import Entry, memory_of, read_into
from mtp_lightning.checkpoint.huggingface.canonical_names import MODULE, TensorSource
from mtp_lightning.checkpoint.huggingface.configs import listed
from mtp_lightning.checkpoint.huggingface.conversions import outgoing
from mtp_lightning.checkpoint.huggingface.folder import HFCheckpoint, open_folder
from mtp_lightning.checkpoint.huggingface.modules import LAYOUTS, ModuleLayout
from mtp_lightning.checkpoint.huggingface.weights import OutgoingWeights
from mtp_lightning.console.progress import say
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.atomic_folder import atomic_folder, check_new_folder, check_staging, staging_path
from mtp_lightning.files.durable import force, sync, write_durably
from mtp_lightning.model.transformers_architecture import architecture_of
from mtp_lightning.model.transformers_library import library

OF_NO_EFFECT = ("family", "initializer_range")
"""Fields of a model that change nothing in what it computes."""
OTHER_BASE = "Name the folder that was imported, or export the heads with their own trunk: --format hf_mtp"


def merge_into(path: Path, folder: Path, out: Path, *, check: Check | None = None) -> None:
    """Copy a folder with modules of its own, and write trained ones in their places.

    Types, shards and all other tensors stay bit for bit, and so do all other files. The trained model must stand on the
    weights of the folder. Memory does not grow with the model.

    Args:
        path: run folder (its newest complete checkpoint is taken), checkpoint or exported folder.
        folder: what was imported, as transformers writes it.
        out: folder to write; new or empty. It appears by one rename when it is complete.
        check: as in `export_model`.

    Raises:
        CheckpointError: the folder has no modules, they are others than those that were trained, they stand on another
            base, or `out` cannot be written.
    """
    check_new_folder(out, CheckpointError)
    source = Source(open_checkpoint(path), "fp32")
    theirs = open_folder(folder, family="transformers" if source.section.is_foreign else None)
    check_staging(staging_path(out), [REPORT, PARITY, *(one.name for one in theirs.path.iterdir())], CheckpointError)
    sources = _sources(source, theirs)
    check_tensors(source.checkpoint)
    weights = OutgoingWeights(source.reader, sources, source.section)
    heads = {name: one.stored for name, one in sources.items() if MODULE.fullmatch(_place(source, name))}
    _check_same_base(weights, theirs, [one.stored for name, one in sources.items() if name not in heads])
    size_bytes = sum(file.stat().st_size for file in theirs.path.rglob("*") if file.is_file())
    with atomic_folder(out, CheckpointError, size_bytes=size_bytes) as staging:
        _copy(theirs.path, staging)
        for one in _placed(weights, theirs, [*dict.fromkeys(heads.values())]):
            _write_over(one, staging / one.file.relative_to(theirs.path))
        _check_written(weights, theirs, staging, heads.values())
        report = {"merged_into": theirs.path.name, "source": source.told, "written": heads}
        write_durably(staging / REPORT, json_bytes(report))
        if check is not None:
            dtypes = {name: theirs.entries[one.stored].dtype for name, one in sources.items()}
            rounded = _AsStored(source.reader, dtypes)
            told = check(staging, FORMATS[FormatName.trunk], replace(source, given=rounded))
            write_durably(staging / PARITY, json_bytes(told))
    say(f"Merged {len(heads)} tensors of {source.checkpoint.path} into a copy of {folder}: {out}; the rest as it was")
    warn_of_untrained(source)


def _place(source: Source, name: str) -> str:
    return source.parameters[name].place or ""


def _sources(source: Source, theirs: HFCheckpoint) -> dict[str, TensorSource]:
    """Find the place of every parameter in the folder.

    Raises:
        CheckpointError: one has none, or another shape.
    """
    layout = next((one for one in LAYOUTS if theirs.native and one.name == theirs.native.name), None)
    if layout is None or theirs.native is None:
        expected = f"a folder to merge into must hold modules, as {', '.join(one.name for one in LAYOUTS)} names them"
        raise CheckpointError(expected, f"none in {theirs.path}", "Export them in a new folder: --format hf_mtp")
    _check_settings(source, theirs, layout)
    assert theirs.section.family is not None
    sources = sources_of(source.recipe, source.parameters, theirs.section.family, layout)
    lost = [name for name in source.parameters if name not in sources]
    lost += [f"{name} ({one.stored})" for name, one in sources.items() if one.stored not in theirs.entries]
    if lost:
        raise CheckpointError(
            "every tensor of the trained model must have its place in the folder to merge into",
            f"none for {listed(lost)}, in {theirs.path}",
            OTHER_BASE,
        )
    for name, one in sources.items():
        trained, stored = one.layout.stored_shape(source.parameters[name].shape), theirs.entries[one.stored].shape
        if tuple(trained) != tuple(stored):
            expected = "tensors of the trained model must have the shapes of those in the folder to merge into"
            raise CheckpointError(expected, f"{one.stored} {[*stored]}, trained {[*trained]}", OTHER_BASE)
    return sources


def _check_settings(source: Source, theirs: HFCheckpoint, layout: ModuleLayout) -> None:
    """Check that the heads were trained on a model that computes the same, and are what readers of the layout run."""
    heads = source.recipe.heads
    implied = {name: value for name, value in layout.heads.items() if name not in ("kind", "concatenation")}
    odd = [f"heads.{name} = {getattr(heads, name)}" for name, value in implied.items() if getattr(heads, name) != value]
    if heads.kind not in ("sequential", "recursive"):
        odd.append(f"heads.kind = {heads.kind}")
    ours = source.section.model_dump(exclude={*OF_NO_EFFECT})
    told = theirs.section.model_dump(exclude={*OF_NO_EFFECT})
    odd += [
        f"model.{name} = {value}, in the folder {told[name]}" for name, value in ours.items() if value != told[name]
    ]
    if odd:
        expected = f"the trained model must be the folder's, with modules as {layout.name}'s readers run them"
        raise CheckpointError(expected, f"{listed(odd)}; {theirs.path}", OTHER_BASE)


def _check_same_base(weights: WeightSource, theirs: HFCheckpoint, names: Sequence[str]) -> None:
    """Compare the weights that the heads were trained on with those of the folder, bit for bit in its types."""
    odd = [name for name in dict.fromkeys(names) if not _is_same(weights, theirs, name)]
    if odd:
        raise CheckpointError(
            "heads must stand on the weights of the folder that they are merged into",
            f"others in {len(odd)} of {len({*names})} tensors: {listed(odd)}; in {theirs.path}",
            f"{OTHER_BASE}. A run keeps them with freeze: [offsets_below_2]",
        )


def _is_same(weights: WeightSource, theirs: HFCheckpoint, name: str) -> bool:
    entry = theirs.entries[name]
    whole = theirs.read(name).flatten() if name in theirs.made else None
    with theirs.files[name].open("rb") as file:
        for start, values in weights.blocks(name):
            stored = torch.empty(values.numel(), dtype=entry.dtype)
            if whole is None:
                read_into(stored, file, entry.begin + start * entry.dtype.itemsize)
            else:
                stored = whole[start : start + values.numel()]
            if not torch.equal(stored.view(torch.uint8), values.to(entry.dtype).view(torch.uint8)):
                return False
    return True


def _copy(folder: Path, staging: Path) -> None:
    """Copy all files of a folder, what links lead to included, and force them to disk."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and ".git" not in file.relative_to(folder).parts:
            target = staging / file.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            sync(target)
            sync(target.parent)


class _Placed(NamedTuple):
    """Values of a stored tensor, and where they go."""

    name: str
    entry: Entry
    file: Path
    blocks: Iterator[tuple[int, Tensor]]


def _placed(weights: OutgoingWeights, theirs: HFCheckpoint, names: Sequence[str]) -> Iterator[_Placed]:
    """Give trained tensors the form that a folder has them in, and say where each lies.

    Raises:
        CheckpointError: one that is stored as several has another number of them there.
    """
    made = [name for name in names if name in theirs.made]
    for name in names:
        if name not in theirs.made:
            yield _Placed(name, theirs.entries[name], theirs.files[name], weights.blocks(name))
    if not made:
        return
    forms = {name: (theirs.entries[name].dtype, theirs.entries[name].shape) for name in made}
    for group in outgoing(library(), architecture_of(theirs.section).model, forms):
        told = theirs.made[group.sources[0]]
        if {*group.forms} != {*told.conversion.sources}:
            expected = "a trained tensor must be stored as transformers stores it"
            found = f"{listed([*told.conversion.sources])} for {group.sources[0]}, in {theirs.path}"
            raise CheckpointError(expected, found, OTHER_BASE)
        whole = group.make(lambda name: read_whole(weights, name))
        for stored, values in whole.items():
            yield _Placed(stored, told.entries[stored], told.files[stored], iter([(0, values.flatten())]))


def _write_over(one: _Placed, path: Path) -> None:
    """Write a tensor into its place in the copy.

    Raises:
        CheckpointError: a value has no place in the folder's type.
    """
    entry = one.entry
    with path.open("r+b") as file:
        for start, values in one.blocks:
            cast = values.to(entry.dtype)
            if not torch.isfinite(cast).all():
                expected = "every trained weight must have a finite value in the folder's type"
                raise CheckpointError(
                    expected, f"one of {one.name} beyond {entry.dtype}", "Take a checkpoint before it"
                )
            file.seek(entry.begin + start * entry.dtype.itemsize)
            file.write(memory_of(cast.contiguous()))
        file.flush()
        force(file.fileno())


def _check_written(weights: WeightSource, theirs: HFCheckpoint, staging: Path, names: Iterable[str]) -> None:
    """Read the heads of the copy back.

    Raises:
        CheckpointError: the disk gives back others.
    """
    copy = open_folder(staging, family="transformers" if theirs.section.is_foreign else None)
    for name in names:
        if not _is_same(weights, copy, name):
            found = f"another {name} in {copy.files[name]}"
            raise CheckpointError(
                "a tensor must be read back as it was written", found, "Check the disk and export again"
            )


@final
@dataclass(frozen=True)
class _AsStored:
    """Weights of a model, rounded to the types that a folder has them in."""

    weights: WeightSource
    dtypes: Mapping[str, torch.dtype]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.dtypes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.shape(name)

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        for start, values in self.weights.blocks(name):
            yield start, values.to(self.dtypes[name])
