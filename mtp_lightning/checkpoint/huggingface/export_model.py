"""The next-token model of a checkpoint as an ordinary folder of transformers, with MTP modules where asked."""

import json
import math
from pathlib import Path
from typing import Any

from mtp_lightning.checkpoint.convert.consolidate import (
    DTYPES,
    Advance,
    check_target,
    check_whole,
    write_whole,
)
from mtp_lightning.checkpoint.convert.load_model import check_tensors
from mtp_lightning.checkpoint.convert.merge_lora import MergedReader, plain_recipe
from mtp_lightning.checkpoint.format.folder import open_checkpoint
from mtp_lightning.checkpoint.format.manifest import CONFIG_NAME, DtypeName
from mtp_lightning.checkpoint.format.read_shards import WHOLE_MODEL, ShardReader
from mtp_lightning.checkpoint.huggingface.canonical_names import (
    BASE,
    Parameter,
    TensorSource,
    num_base_layers,
    parameters_of,
)
from mtp_lightning.checkpoint.huggingface.configs import listed
from mtp_lightning.checkpoint.huggingface.families import FAMILIES, settings_of
from mtp_lightning.checkpoint.huggingface.import_model import carry_tokenizer
from mtp_lightning.checkpoint.huggingface.modules import DEEPSEEK, MIMO, ModuleLayout, fits
from mtp_lightning.checkpoint.huggingface.weights import OutgoingWeights
from mtp_lightning.console.progress import say, watched
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.atomic_folder import atomic_folder
from mtp_lightning.files.durable import write_durably
from mtp_lightning.recipe import Recipe
from mtp_lightning.recipe.schema.model import Family
from mtp_lightning.recipe.trainable import mixing_offsets

TORCH_NAMES: dict[DtypeName, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def export_hf(path: Path, out: Path, *, dtype: DtypeName = "fp32", with_modules: bool = False) -> None:
    """Write trunk and main head as a folder that transformers opens, checked value by value.

    Args:
        path: run folder (its newest complete checkpoint), checkpoint, exported or imported folder.
        out: folder to write; new or empty. It appears by one rename when it is complete.
        dtype: type of the written weights.
        with_modules: write sequential modules too, under DeepSeek's names (MiMo's in a model of that family).

    Raises:
        CheckpointError: there is nothing to export, it is damaged, no family of transformers is this model, the heads
            are not modules that its readers could run, or `out` cannot be written.
    """
    check_target(out)
    checkpoint = open_checkpoint(path)
    recipe = plain_recipe(checkpoint.recipe)
    _check_main_head(recipe)
    parameters = parameters_of(recipe)
    section = recipe.model.model_copy(update={"num_hidden_layers": num_base_layers(parameters)})
    family, settings = settings_of(section)
    layout = _layout_of(recipe, family) if with_modules else None
    sources = sources_of(recipe, parameters, family, layout)
    settings |= _frame(recipe, family, layout, dtype)
    check_tensors(checkpoint)
    weights = OutgoingWeights(MergedReader(checkpoint.reader, checkpoint.recipe), sources, section)
    with watched(f"Exporting {checkpoint.path.name}", total_bytes=2 * checkpoint.model_bytes, show=True) as advance:
        size_bytes = _write(weights, out, dtype, advance, recipe=recipe, settings=settings)
    say(f"Exported {checkpoint.path} to {out} as {family}: {size_bytes / 1e6:,.1f} MB of {dtype} weights, checked")
    if left := {parameters[name].owner for name in parameters} - {parameters[name].owner for name in sources}:
        say(f"Left out, because the format has no place for it: {', '.join(sorted(left))}")


def _write(
    weights: OutgoingWeights,
    out: Path,
    dtype: DtypeName,
    advance: Advance,
    *,
    recipe: Recipe,
    settings: dict[str, Any],
) -> int:
    """Write the folder; return the bytes of its weights."""
    size_bytes = sum(math.prod(weights.shape(name)) for name in weights.names) * DTYPES[dtype].itemsize
    with atomic_folder(out, CheckpointError, size_bytes=size_bytes) as partial:
        record = write_whole(weights, partial / WHOLE_MODEL, DTYPES[dtype], advance)
        check_whole(weights, ShardReader(partial), advance)
        write_durably(partial / CONFIG_NAME, json.dumps(settings, indent=2, sort_keys=True).encode() + b"\n")
        if recipe.data.tokenizer != "byte" and (tokenizer := Path(recipe.data.tokenizer)).is_file():
            carry_tokenizer(tokenizer, partial)
    return record.size_bytes


def _check_main_head(recipe: Recipe) -> None:
    if 1 in mixing_offsets(recipe):
        raise CheckpointError(
            "the main head of an exported model must read the last layer, as transformers runs it",
            "a mixture of all layers (adapt.layer_mix)",
            "Train with adapt.layer_mix.main_head=false, or export with --format consolidated",
        )


def _layout_of(recipe: Recipe, family: Family) -> ModuleLayout:
    layout = MIMO if family == "mimo" else DEEPSEEK
    if not fits(layout, recipe.heads) or FAMILIES[family].source("norm.weight") != FAMILIES["llama"].source(
        "norm.weight"
    ):
        heads = recipe.heads
        raise CheckpointError(
            f"modules in {layout.name}'s layout must be sequential, of one layer, behind a trunk with Llama's names, "
            f"and read the hidden state {layout.heads['hidden']}, as its readers let them",
            f"{heads.kind} heads of {heads.layers_per_head} layers, {heads.hidden}, on {family}",
            "Export the next-token model alone with --format hf, or everything with --format consolidated",
        )
    return layout


def sources_of(
    recipe: Recipe, parameters: dict[str, Parameter], family: Family, layout: ModuleLayout | None
) -> dict[str, TensorSource]:
    """Find where each parameter goes that the format has a place for.

    Raises:
        CheckpointError: one that the scores depend on goes nowhere.
    """
    sources, num_layers = {}, num_base_layers(parameters)
    for name, parameter in parameters.items():
        source = FAMILIES[family].source(parameter.place) if parameter.place else None
        if source is None and parameter.place and layout:
            source = layout.source(parameter.place, num_layers, concatenation=recipe.heads.concatenation)
        if source is not None:
            sources[name] = source
    wanted = (*BASE, "modules.") if layout else BASE
    lost = [name for name, one in parameters.items() if name not in sources and _is_wanted(one, wanted)]
    if lost:
        raise CheckpointError(
            f"all that the scores depend on must have a place in the format of {family}",
            f"none for {listed(lost)}",
            "Export with --format consolidated",
        )
    return sources


def _is_wanted(parameter: Parameter, wanted: tuple[str, ...]) -> bool:
    """Tell whether a parameter lies in one of some places, or is not known to be in another."""
    if parameter.place is not None:
        return parameter.place.startswith(wanted)
    return not parameter.owner.startswith(("offset ", "unembedding"))


def _frame(recipe: Recipe, family: Family, layout: ModuleLayout | None, dtype: DtypeName) -> dict[str, Any]:
    """What config.json says beside the settings of the family."""
    told: dict[str, Any] = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "torch_dtype": TORCH_NAMES[dtype],
        "bos_token_id": None,
        "eos_token_id": recipe.data.end_of_document,
    }
    if layout is not None:
        num_modules = recipe.heads.num_offsets - 1
        told |= {"num_nextn_predict_layers": num_modules, "num_mtp_layers": num_modules}
        if family in ("qwen2", "qwen3"):
            told["mtp_layer_types"] = ["full_attention"] * num_modules
    return told
