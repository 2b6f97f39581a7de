"""A checkpoint of any number of ranks as one ordinary folder: model.safetensors, config.json, recipe.yaml."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from mtp_lightning.checkpoint.convert.load_model import check_tensors
from mtp_lightning.checkpoint.convert.merge_lora import MergedReader, plain_recipe
from mtp_lightning.checkpoint.format.carried_files import CARRIED, TEMPLATES, copy_files, files_of_model
from mtp_lightning.checkpoint.format.folder import CheckpointFolder, open_checkpoint
from mtp_lightning.checkpoint.format.manifest import CONFIG_NAME, RECIPE_NAME, DtypeName, Provenance, write_config
from mtp_lightning.checkpoint.format.read_shards import WHOLE_MODEL, ShardReader
from mtp_lightning.checkpoint.format.reader_view import WeightSource
from mtp_lightning.checkpoint.format.tensors import build_header, memory_of
from mtp_lightning.console.progress import say, watched
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.atomic_folder import atomic_folder, check_new_folder, check_staging, staging_path
from mtp_lightning.files.durable import FileRecord, Recorder, durable_file, write_durably
from mtp_lightning.recipe import recipe_to_yaml

DTYPES: dict[DtypeName, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REPORT_NAME = "import.json"
_OWN_FILES = (WHOLE_MODEL, CONFIG_NAME, RECIPE_NAME, REPORT_NAME, TEMPLATES, *CARRIED)
Advance = Callable[[int], None]


def name_of(dtype: torch.dtype) -> DtypeName:
    """Name a type of weights as on the command line."""
    return next(name for name, kept in DTYPES.items() if kept == dtype)


def consolidate(path: Path, out: Path, *, dtype: DtypeName = "fp32") -> None:
    """Export the weights of a run or checkpoint into a new folder, and check them there value by value.

    Low-rank updates are added to the weights that they belong to, and the folder's recipe knows nothing of them.
    Needs no GPU and, however large the model, less than 64 MiB of memory beside the libraries' own. The bytes of
    model.safetensors depend on the weights alone, not on the ranks that wrote them. The folder appears when it is
    complete, by one rename.

    Raises:
        CheckpointError: there is nothing to export, a shard is missing or damaged (named, with the checkpoint before
            it that is good), a weight has no finite value in `dtype`, or `out` cannot be written or is not empty.
    """
    check_target(out)
    checkpoint = open_checkpoint(path)
    if checkpoint.is_export:
        raise CheckpointError(
            "mtp export reads a run folder or a checkpoint folder",
            f"an exported folder, {checkpoint.path}",
            "Export the checkpoint that it came from",
        )
    check_tensors(checkpoint)
    weights = MergedReader(checkpoint.reader, checkpoint.recipe)
    total_bytes = 2 * checkpoint.model_bytes
    with (
        watched(f"Exporting {checkpoint.path.name}", total_bytes=total_bytes, show=True) as advance,
        atomic_folder(out, CheckpointError, size_bytes=_size_bytes(weights, DTYPES[dtype])) as staging,
    ):
        record = write_whole(weights, staging / WHOLE_MODEL, DTYPES[dtype], advance)
        check_whole(weights, ShardReader(staging), advance)
        _write_descriptions(checkpoint, staging, record, dtype=dtype)
    say(f"Exported {checkpoint.path} to {out}: {record.size_bytes / 1e6:,.1f} MB of {dtype} weights, checked")


def write_whole(
    reader: WeightSource,
    path: Path,
    dtype: torch.dtype,
    advance: Advance,
    *,
    of_own_type: Mapping[str, torch.dtype] = MappingProxyType({}),
) -> FileRecord:
    """Write all weights into one safetensors file, block by block; `advance` is told of bytes read.

    Tensors of ids are written in types of their own.

    Raises:
        CheckpointError: a weight is finite as stored, but not in `dtype`.
        OSError: the disk is full.
    """
    types = {name: of_own_type.get(name, dtype) for name in reader.names}
    header, order = build_header({name: (one, reader.shape(name)) for name, one in types.items()})
    with durable_file(path) as file:
        recorder = Recorder(file)
        recorder.write(header)
        for name in order:
            for _, values in reader.blocks(name):
                recorder.write(memory_of(_cast(values, types[name], name)))
                advance(values.nbytes)
        return recorder.record


def check_whole(reader: WeightSource, written: ShardReader, advance: Advance) -> None:
    """Compare every byte of the written weights with those of the shards; `advance` is told of bytes read.

    Raises:
        CheckpointError: names the first tensor that differs.
    """
    for name in reader.names:
        is_same = written.shape(name) == reader.shape(name)
        for start, values in reader.blocks(name):
            expected = _cast(values, written.dtype(name), name)
            found = written.read(name, start=start, stop=start + values.numel())
            is_same = is_same and torch.equal(expected.view(torch.uint8), found.view(torch.uint8))
            advance(values.nbytes)
        if not is_same:
            raise CheckpointError(
                "an exported tensor must be read back as it was written",
                f"another {name} in {written.folder}",
                "Check the disk and export again",
            )


def _cast(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = values.to(dtype)
    if values.dtype != dtype and not torch.equal(torch.isfinite(cast), torch.isfinite(values)):
        raise CheckpointError(
            "every weight must have a finite value in the type that is exported",
            f"a weight of {name} beyond the range of {dtype}",
            "Export with --dtype fp32",
        )
    return cast


def _size_bytes(reader: MergedReader, dtype: torch.dtype) -> int:
    return sum(reader.numel(name) for name in reader.names) * dtype.itemsize


def _write_descriptions(checkpoint: CheckpointFolder, staging: Path, model: FileRecord, *, dtype: DtypeName) -> None:
    plain = plain_recipe(checkpoint.recipe)
    is_same = plain is checkpoint.recipe
    text = (checkpoint.path / RECIPE_NAME).read_bytes() if is_same else recipe_to_yaml(plain).encode()
    files = {WHOLE_MODEL: model, RECIPE_NAME: write_durably(staging / RECIPE_NAME, text)}
    copy_files(files_of_model(checkpoint.recipe), staging)
    manifest = checkpoint.manifest
    provenance = Provenance(manifest.step, manifest.tokens, checkpoint.sha256, manifest.recipe_hash)
    write_config(staging, plain, provenance, files, dtype=dtype)


def check_target(out: Path) -> None:
    """Refuse to overwrite anything that is not left over from an interrupted export."""
    check_new_folder(out, CheckpointError)
    check_staging(staging_path(out), _OWN_FILES, CheckpointError)
