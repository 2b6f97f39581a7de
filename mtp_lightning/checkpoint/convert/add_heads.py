"""A checkpoint with more heads than were trained, as an exported folder that training can start from."""

import math
from pathlib import Path

from mtp_lightning.checkpoint.convert.consolidate import check_target, check_whole, name_of, write_whole
from mtp_lightning.checkpoint.convert.load_model import check_tensors, stored_dtype
from mtp_lightning.checkpoint.format.carried_files import copy_files, files_of_model
from mtp_lightning.checkpoint.format.folder import CheckpointFolder, open_checkpoint
from mtp_lightning.checkpoint.format.manifest import RECIPE_NAME, Provenance, write_config
from mtp_lightning.checkpoint.format.read_shards import WHOLE_MODEL, ShardReader
from mtp_lightning.checkpoint.format.reader_view import RenamingReader
from mtp_lightning.console.progress import say, watched
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.atomic_folder import atomic_folder
from mtp_lightning.files.durable import write_durably
from mtp_lightning.model.add_heads import parameter_origins
from mtp_lightning.recipe import Recipe, num_head_layers, num_trunk_layers, recipe_to_yaml
from mtp_lightning.recipe.add_heads import extended_recipe
from mtp_lightning.recipe.schema.model import BELOW


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
    check_target(out)
    checkpoint = open_checkpoint(path)
    recipe, reader, manifest = checkpoint.recipe, checkpoint.reader, checkpoint.manifest
    _check_described(checkpoint)
    group = recipe.heads.num_offsets - 1 if group is None else group
    extended = extended_recipe(recipe, num_offsets, group)
    check_tensors(checkpoint)
    renamed = RenamingReader(reader, parameter_origins(recipe, extended, group))
    if not train_free:
        extended = _to_be_trained(extended, recipe, out)
    dtype = stored_dtype(reader)
    num_values = sum(math.prod(renamed.shape(name)) for name in renamed.names)
    with (
        watched(f"Extending {checkpoint.path.name}", total_bytes=2 * checkpoint.model_bytes, show=True) as advance,
        atomic_folder(out, CheckpointError, size_bytes=num_values * dtype.itemsize) as staging,
    ):
        record = write_whole(renamed, staging / WHOLE_MODEL, dtype, advance)
        check_whole(renamed, ShardReader(staging), advance)
        copy_files(files_of_model(recipe, checkpoint.path), staging)
        text = recipe_to_yaml(extended).encode()
        written = {WHOLE_MODEL: record, RECIPE_NAME: write_durably(staging / RECIPE_NAME, text)}
        provenance = Provenance(manifest.step, manifest.tokens, checkpoint.sha256)
        write_config(staging, extended, provenance, written, dtype=name_of(dtype))
    say(f"Extended {checkpoint.path} from {recipe.heads.num_offsets} to {num_offsets} offsets in {out}")
    if not train_free:
        say(f"Train the new heads: mtp train {out / RECIPE_NAME}")


def _check_described(checkpoint: CheckpointFolder) -> None:
    """Refuse a folder whose manifest speaks of other heads or layers than its recipe."""
    recipe, manifest = checkpoint.recipe, checkpoint.manifest
    own = {"offsets": recipe.heads.num_offsets, "trunk": num_trunk_layers(recipe), "heads": num_head_layers(recipe)}
    described = {"offsets": manifest.num_offsets, **manifest.layers}
    if own != described:
        raise CheckpointError(
            "a checkpoint's manifest and its recipe must agree on the offsets and the layers of trunk and heads",
            f"{described} in the manifest and {own} by the recipe, in {checkpoint.path}",
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
