"""Trained heads put back into a copy of the folder that they came with; every other byte stays as it is."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from mtp_lightning.checkpoint.convert.load_model import check_tensors
from mtp_lightning.checkpoint.export.contents import Source
from mtp_lightning.checkpoint.export.formats import FORMATS
from mtp_lightning.checkpoint.export.names import FormatName
from mtp_lightning.checkpoint.export.write import PARITY, REPORT, Check, json_bytes, warn_of_untrained
from mtp_lightning.checkpoint.format.folder import open_checkpoint
from mtp_lightning.checkpoint.format.reader_view import WeightSource
from mtp_lightning.checkpoint.format.tensors import memory_of, read_into
from mtp_lightning.checkpoint.huggingface.canonical_names import TensorSource
from mtp_lightning.checkpoint.huggingface.configs import listed
from mtp_lightning.checkpoint.huggingface.folder import HFCheckpoint, open_folder, read_entries
from mtp_lightning.checkpoint.huggingface.modules import Native
from mtp_lightning.checkpoint.huggingface.weight_files import find_weights
from mtp_lightning.checkpoint.huggingface.weights import outgoing_weights
from mtp_lightning.console.progress import say
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.atomic_folder import atomic_folder, check_new_folder, check_staging, staging_path
from mtp_lightning.files.durable import force, sync, write_durably

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
    theirs = open_folder(folder)
    check_staging(staging_path(out), [REPORT, PARITY, *(one.name for one in theirs.path.iterdir())], CheckpointError)
    source = Source(open_checkpoint(path), "fp32")
    sources, section = _sources(source, theirs), source.section
    check_tensors(source.checkpoint)
    is_base = {name: theirs.base_source(_place(source, name)) is not None for name in sources}
    base, heads = (
        outgoing_weights(source.reader, {name: one for name, one in sources.items() if is_base[name] == side}, section)
        for side in (True, False)
    )
    dtypes = {name: theirs.entries[one.stored].dtype for name, one in sources.items()}
    theirs = _as_stored(theirs)
    _check_placed([name for name in heads.names if name not in theirs.entries], theirs)
    _check_same_base(base, theirs)
    size_bytes = sum(file.stat().st_size for file in theirs.path.rglob("*") if file.is_file())
    with atomic_folder(out, CheckpointError, size_bytes=size_bytes) as staging:
        _copy(theirs.path, staging)
        for stored in heads.names:
            _write_over(heads, theirs, staging, stored)
        written = {name: one.stored for name, one in sources.items() if not is_base[name]}
        report = {"merged_into": theirs.path.name, "source": source.told, "written": written}
        write_durably(staging / REPORT, json_bytes(report))
        if check is not None:
            rounded = _AsStored(source.reader, dtypes)
            told = check(staging, FORMATS[FormatName.trunk], replace(source, given=rounded))
            write_durably(staging / PARITY, json_bytes(told))
    merged = f"{len(heads.names)} tensors of {source.checkpoint.path}"
    say(f"Merged {merged} into a copy of {folder}: {out}; the rest as it was")
    warn_of_untrained(source)


def _place(source: Source, name: str) -> str:
    return source.parameters[name].place or ""


def _sources(source: Source, theirs: HFCheckpoint) -> dict[str, TensorSource]:
    """Find the place of every parameter in the folder.

    Raises:
        CheckpointError: one has none, or another shape.
    """
    native = theirs.native
    if native is None:
        expected = (
            "a folder to merge into must hold heads under names that are known here, as DeepSeek's, MiMo's, Qwen's"
        )
        raise CheckpointError(expected, f"none in {theirs.path}", "Export them in a new folder: --format hf_mtp")
    _check_settings(source, theirs, native)
    found = {
        name: theirs.base_source(place := _place(source, name)) or native.source(place) for name in source.parameters
    }
    sources = {name: one for name, one in found.items() if one is not None and one.stored in theirs.entries}
    lost = [name if (one := found[name]) is None else one.stored for name in found if name not in sources]
    _check_placed(lost, theirs)
    for name, one in sources.items():
        trained, stored = one.layout.stored_shape(source.parameters[name].shape), theirs.entries[one.stored].shape
        if tuple(trained) != tuple(stored):
            expected = "tensors of the trained model must have the shapes of those in the folder to merge into"
            raise CheckpointError(expected, f"{one.stored} {[*stored]}, trained {[*trained]}", OTHER_BASE)
    return sources


def _check_placed(lost: list[str], theirs: HFCheckpoint) -> None:
    if lost:
        raise CheckpointError(
            "every tensor of the trained model must have its place in the folder to merge into",
            f"none for {listed(lost)}, in {theirs.path}",
            OTHER_BASE,
        )


def _check_settings(source: Source, theirs: HFCheckpoint, native: Native) -> None:
    """Check that the heads were trained on a model that computes the same, and are what readers of the layout run."""
    heads = source.recipe.heads.model_dump()
    odd = [f"heads.{name} = {heads[name]}" for name, value in native.heads.items() if heads[name] != value]
    if (native.heads["kind"], heads["kind"]) == ("sequential", "recursive"):  # one module, unrolled
        odd.remove("heads.kind = recursive")
    ours = source.section.model_dump(exclude={*OF_NO_EFFECT})
    told = theirs.section.model_dump(exclude={*OF_NO_EFFECT})
    odd += [
        f"model.{name} = {value}, in the folder {told[name]}" for name, value in ours.items() if value != told[name]
    ]
    if odd:
        expected = f"the trained model must be the folder's, with heads as the readers of {native.name} run them"
        raise CheckpointError(expected, f"{listed(odd)}; {theirs.path}", OTHER_BASE)


def _as_stored(theirs: HFCheckpoint) -> HFCheckpoint:
    """See a folder by the tensors in its files, where classes of transformers make others of these."""
    if not theirs.section.is_foreign:
        return theirs
    entries, files = read_entries(find_weights(theirs.path, "model*.safetensors").read)
    return replace(theirs, entries=entries, files=files)


def _check_same_base(weights: WeightSource, theirs: HFCheckpoint) -> None:
    """Compare the weights that the heads were trained on with those of the folder, bit for bit in its types."""
    names = [*weights.names]
    odd = [name for name in names if name not in theirs.entries or not _is_same(weights, theirs, name)]
    if odd:
        raise CheckpointError(
            "heads must stand on the weights of the folder that they are merged into",
            f"others in {len(odd)} of {len(names)} tensors: {listed(odd)}; in {theirs.path}",
            f"{OTHER_BASE}. A run keeps them with freeze: [offsets_below_2]",
        )


def _is_same(weights: WeightSource, theirs: HFCheckpoint, name: str) -> bool:
    entry = theirs.entries[name]
    with theirs.files[name].open("rb") as file:
        for start, values in weights.blocks(name):
            stored = torch.empty(values.numel(), dtype=entry.dtype)
            read_into(stored, file, entry.begin + start * entry.dtype.itemsize)
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


def _write_over(weights: WeightSource, theirs: HFCheckpoint, staging: Path, name: str) -> None:
    """Write a tensor into its place in the copy, and read it back.

    Raises:
        CheckpointError: a value has no place in the folder's type, or the disk gives back another.
    """
    entry, path = theirs.entries[name], staging / theirs.files[name].relative_to(theirs.path)
    with path.open("r+b") as file:
        for start, values in weights.blocks(name):
            cast = values.to(entry.dtype)
            if not torch.isfinite(cast).all():
                expected = "every trained weight must have a finite value in the folder's type"
                raise CheckpointError(expected, f"one of {name} beyond {entry.dtype}", "Take a checkpoint before it")
            file.seek(entry.begin + start * entry.dtype.itemsize)
            file.write(memory_of(cast.contiguous()))
        file.flush()
        force(file.fileno())
    if not _is_same(weights, replace(theirs, files={name: path}), name):
        found = f"another {name} in {path}"
        raise CheckpointError("a tensor must be read back as it was written", found, "Check the disk and export again")


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
