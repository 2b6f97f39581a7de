"""A checkpoint of any number of ranks as one ordinary folder: model.safetensors, config.json, recipe.yaml."""

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mtp_lightning import __version__
from mtp_lightning.checkpoint.convert.config_json import CONFIG_NAME, DtypeName, ExportConfig
from mtp_lightning.checkpoint.convert.load_model import check_tensors, find_checkpoint, model_files, offering_another
from mtp_lightning.checkpoint.convert.merge_lora import MergedReader, plain_recipe
from mtp_lightning.checkpoint.format.layout import check_digests
from mtp_lightning.checkpoint.format.manifest import MANIFEST_NAME, RECIPE_NAME, read_manifest
from mtp_lightning.checkpoint.format.read_shards import WHOLE_MODEL, ShardReader
from mtp_lightning.checkpoint.format.tensors import build_header, memory_of
from mtp_lightning.console.progress import say, watched
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.durable import FileRecord, Recorder, durable_file, sync_folder, write_durably
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.recipe import Recipe, load_recipe, recipe_to_yaml

DTYPES: dict[DtypeName, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CARRIED = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
"""Small files of other programs that go with a tokenizer; the first two are one."""
REPORT_NAME = "import.json"
_OWN_FILES = {WHOLE_MODEL, CONFIG_NAME, RECIPE_NAME, REPORT_NAME, *CARRIED}
Advance = Callable[[int], None]


def name_of(dtype: torch.dtype) -> DtypeName:
    """Name a type of weights as on the command line."""
    return next(name for name, kept in DTYPES.items() if kept == dtype)


class WeightSource(Protocol):
    """Named weights that can be read block by block."""

    @property
    def names(self) -> Iterable[str]:
        """Every parameter."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield a parameter's values in consecutive blocks, each with the number of its first value."""


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
    checkpoint = find_checkpoint(path)
    _check_is_checkpoint(checkpoint)
    check_target(out)
    with offering_another(checkpoint):
        files = model_files(checkpoint)
        read_bytes = sum(record.size_bytes for record in files.values())
        with watched(f"Exporting {checkpoint.name}", total_bytes=3 * read_bytes, show=True) as advance:
            check_digests(checkpoint, files, advance)
            reader, recipe = ShardReader(checkpoint), load_recipe(checkpoint / RECIPE_NAME).recipe
            with torch.device("meta"):
                check_tensors(MtpModel(recipe), reader)
            weights = MergedReader(reader, recipe)
            with appearing(out, size_bytes=_size_bytes(weights, DTYPES[dtype])) as partial:
                record = write_whole(weights, partial / WHOLE_MODEL, DTYPES[dtype], advance)
                check_whole(weights, ShardReader(partial), advance)
                _write_descriptions(checkpoint, partial, recipe, record, dtype=dtype)
    say(f"Exported {checkpoint} to {out}: {record.size_bytes / 1e6:,.1f} MB of {dtype} weights, checked")


def write_whole(reader: WeightSource, path: Path, dtype: torch.dtype, advance: Advance) -> FileRecord:
    """Write all weights into one safetensors file, block by block; `advance` is told of bytes read.

    Raises:
        CheckpointError: a weight is finite as stored, but not in `dtype`.
        OSError: the disk is full.
    """
    header, order = build_header({name: (dtype, reader.shape(name)) for name in reader.names})
    with durable_file(path) as file:
        recorder = Recorder(file)
        recorder.write(header)
        for name in order:
            for _, values in reader.blocks(name):
                recorder.write(memory_of(_cast(values, dtype, name)))
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


def _write_descriptions(
    checkpoint: Path, partial: Path, recipe: Recipe, model: FileRecord, *, dtype: DtypeName
) -> None:
    manifest = read_manifest(checkpoint)
    plain = plain_recipe(recipe)
    text = (checkpoint / RECIPE_NAME).read_bytes() if plain is recipe else recipe_to_yaml(plain).encode()
    recipe_record = write_durably(partial / RECIPE_NAME, text)
    config = ExportConfig(
        package_version=__version__,
        model=recipe.model.model_dump(mode="json"),
        heads=recipe.heads.model_dump(mode="json"),
        num_offsets=manifest.num_offsets,
        layers=manifest.layers,
        step=manifest.step,
        tokens=manifest.tokens,
        dtype=dtype,
        recipe_hash=manifest.recipe_hash,
        source_manifest_sha256=hashlib.sha256((checkpoint / MANIFEST_NAME).read_bytes()).hexdigest(),
        files={WHOLE_MODEL: model, RECIPE_NAME: recipe_record},
    )
    write_durably(partial / CONFIG_NAME, config.model_dump_json(indent=2).encode() + b"\n")


def _check_is_checkpoint(checkpoint: Path) -> None:
    if not (checkpoint / MANIFEST_NAME).is_file():
        raise CheckpointError(
            "mtp export reads a run folder or a checkpoint folder",
            f"an exported folder, {checkpoint}",
            "Export the checkpoint that it came from",
        )


def check_target(out: Path) -> None:
    """Refuse to overwrite anything that is not left over from an interrupted export."""
    partial = _partial_of(out)
    leftovers = {path.name for path in partial.iterdir()} if partial.is_dir() else set()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        blocking = out
    elif partial.is_file() or leftovers - _OWN_FILES:
        blocking = partial
    else:
        return
    raise CheckpointError(
        "the folder to export into must be new or empty",
        f"{blocking}, which is {'a file' if blocking.is_file() else 'a folder with files in it'}",
        "Give another --out, or move that away",
    )


def _partial_of(out: Path) -> Path:
    return out.absolute().with_name(out.absolute().name + ".partial")


@contextmanager
def appearing(out: Path, *, size_bytes: int) -> Iterator[Path]:
    """Give what the body writes into the folder that it is given its name, or leave no trace of it."""
    partial = _partial_of(out)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if (free_bytes := shutil.disk_usage(partial).free) < size_bytes:
            raise _unwritable(out, f"{free_bytes / 2**20:,.0f} MiB free of {size_bytes / 2**20:,.0f} MiB needed")
        yield partial
        sync_folder(partial)
        partial.rename(out)
        sync_folder(partial.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _unwritable(out, str(error)) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _unwritable(out: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"the export must be written to {out}", found, "Make room or repair access, or give another --out"
    )
