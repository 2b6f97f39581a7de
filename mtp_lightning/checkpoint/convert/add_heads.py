"""A checkpoint with more heads than were trained, as an exported folder that training can start from."""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from mtp_lightning.checkpoint.convert.config_json import CONFIG_NAME, Provenance, read_config, write_config
from mtp_lightning.checkpoint.convert.consolidate import appearing, check_target, check_whole, name_of, write_whole
from mtp_lightning.checkpoint.convert.load_model import (
    check_tensors,
    find_checkpoint,
    model_files,
    offering_another,
    stored_dtype,
)
from mtp_lightning.checkpoint.format.layout import check_digests
from mtp_lightning.checkpoint.format.manifest import MANIFEST_NAME, RECIPE_NAME, read_manifest
from mtp_lightning.checkpoint.format.read_shards import WHOLE_MODEL, ShardReader
from mtp_lightning.checkpoint.format.reader_view import ReaderView
from mtp_lightning.console.progress import say, watched
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.durable import write_durably
from mtp_lightning.model.add_heads import parameter_origins
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.recipe import Recipe, load_recipe, num_head_layers, num_trunk_layers, recipe_to_yaml
from mtp_lightning.recipe.add_heads import extended_recipe
from mtp_lightning.recipe.schema.adapt import BELOW


def extend_checkpoint(
    path: Path, out: Path, num_offsets: int, *, group: int | None = None, train_free: bool = False
) -> None:
    """Write a trained model with more heads, copied from its last `group` trained ones, into a new folder.

    Weights are copied as stored, bit for bit. The folder's recipe is ready to be trained: it starts from the folder,
    in a run folder of its own, and only the new heads are trainable (`train_free`: as for decoding, nothing set).

    Args:
        path: run folder (its newest complete checkpoint), checkpoint folder or exported folder.
        out: folder to write; new or empty. It appears by one rename when it is complete.
        num_offsets: number n of tokens to predict, the next one included.
        group: how many trained heads to copy again and again; None means all beyond the first.
        train_free: leave the recipe's training fields alone.

    Raises:
        CheckpointError: there is nothing to extend, it cannot be, it is damaged or contradicts its manifest, or `out`
            cannot be written.
        RecipeError: the extended recipe breaks a rule.
    """
    checkpoint = find_checkpoint(path)
    check_target(out)
    with offering_another(checkpoint):
        files, source = model_files(checkpoint), _read_source(checkpoint)
        recipe, reader = load_recipe(checkpoint / RECIPE_NAME).recipe, ShardReader(checkpoint)
        _check_described(recipe, source, checkpoint)
        group = recipe.heads.num_offsets - 1 if group is None else group
        extended = extended_recipe(recipe, num_offsets, group)
        with torch.device("meta"):
            check_tensors(MtpModel(recipe), reader)
        renamed = ReaderView(reader, parameter_origins(recipe, extended, group))
        if not train_free:
            extended = _to_be_trained(extended, recipe, out)
        read_bytes = sum(record.size_bytes for record in files.values())
        with watched(f"Extending {checkpoint.name}", total_bytes=3 * read_bytes, show=True) as advance:
            check_digests(checkpoint, files, advance)
            dtype = stored_dtype(reader)
            num_values = sum(math.prod(renamed.shape(name)) for name in renamed.names)
            with appearing(out, size_bytes=num_values * dtype.itemsize) as partial:
                record = write_whole(renamed, partial / WHOLE_MODEL, dtype, advance)
                check_whole(renamed, ShardReader(partial), advance)
                text = recipe_to_yaml(extended).encode()
                written = {WHOLE_MODEL: record, RECIPE_NAME: write_durably(partial / RECIPE_NAME, text)}
                provenance = Provenance(source.step, source.tokens, source.sha256)
                write_config(partial, extended, provenance, written, dtype=name_of(dtype))
    say(f"Extended {checkpoint} from {recipe.heads.num_offsets} to {num_offsets} offsets in {out}")
    if not train_free:
        say(f"Train the new heads: mtp train {out / RECIPE_NAME}")


class _Source(NamedTuple):
    """What the extended folder says of where it comes from."""

    num_offsets: int
    layers: Mapping[str, int]
    step: int
    tokens: int
    sha256: str  # of the manifest or config.json


def _read_source(checkpoint: Path) -> _Source:
    is_checkpoint = (checkpoint / MANIFEST_NAME).is_file()
    described = read_manifest(checkpoint) if is_checkpoint else read_config(checkpoint)
    text = (checkpoint / (MANIFEST_NAME if is_checkpoint else CONFIG_NAME)).read_bytes()
    digest = hashlib.sha256(text).hexdigest()
    return _Source(described.num_offsets, described.layers, described.step, described.tokens, digest)


def _layers(recipe: Recipe) -> dict[str, int]:
    return {"trunk": num_trunk_layers(recipe), "heads": num_head_layers(recipe)}


def _check_described(recipe: Recipe, source: _Source, checkpoint: Path) -> None:
    """Refuse a folder whose manifest speaks of other heads or layers than its recipe."""
    own = {"offsets": recipe.heads.num_offsets, **_layers(recipe)}
    described = {"offsets": source.num_offsets, **source.layers}
    if own != described:
        raise CheckpointError(
            "a checkpoint's manifest and its recipe must agree on the offsets and the layers of trunk and heads",
            f"{described} in the manifest and {own} by the recipe, in {checkpoint}",
            "Use the folder as it was written; one of the two has been changed since",
        )


def _to_be_trained(extended: Recipe, recipe: Recipe, out: Path) -> Recipe:
    """Say in the recipe that only the new heads are trained, from this folder on, in a run folder of their own."""
    num_trained, num_offsets = recipe.heads.num_offsets, extended.heads.num_offsets
    first = {"recursive": 2}.get(extended.heads.kind, num_trained + 1) if num_offsets > num_trained else None
    run = {"dir": f"{recipe.run.dir}-n{num_offsets}", "restart": False}
    sections = {
        "freeze": [*recipe.frozen_parts, *([f"{BELOW}{first}"] if first else [])],
        "run": extended.run.model_copy(update=run),
        "init": extended.init.model_copy(update={"path": str(out.absolute())}),
    }
    return extended.model_copy(update=sections)
