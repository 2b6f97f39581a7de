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
from mtp_lightning.checkpoint.format.carried_files import (
    GENERATION_CONFIG,
    SOURCE_CONFIG,
    Files,
    copy_files,
    end_ids,
    files_of_model,
    read_settings,
)
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
from mtp_lightning.checkpoint.huggingface.configs import Config, listed
from mtp_lightning.checkpoint.huggingface.families import (
    FAMILIES,
    architecture_name,
    base_source,
    section_of,
    settings_of,
)
from mtp_lightning.checkpoint.huggingface.folder import DECLARED, changed
from mtp_lightning.checkpoint.huggingface.modules import DEEPSEEK, MIMO, ModuleLayout, fits
from mtp_lightning.checkpoint.huggingface.weights import ConvertedWeights, OutgoingWeights, outgoing_weights
from mtp_lightning.console.progress import say, watched
from mtp_lightning.data.loading.corpus import recipe_tokenizer
from mtp_lightning.errors import CheckpointError, DataError
from mtp_lightning.files.atomic_folder import atomic_folder
from mtp_lightning.files.durable import write_durably
from mtp_lightning.recipe import Recipe
from mtp_lightning.recipe.schema.model import Family, ModelSection
from mtp_lightning.recipe.trainable import mixing_offsets

REPLACED = (*DECLARED, "mtp_layer_types", "dtype", "torch_dtype", "auto_map")
"""Fields of an imported model's settings that are written anew, or speak of what is not written."""
OF_LAYERS = ("rope_parameters", "rope_scaling", "rope_theta", "layer_types", "max_window_layers", "head_dim")
"""Fields that can only be right together with others."""
READERS: dict[str | None, str] = {
    None: "Who can read it: every engine that knows {architecture}",
    DEEPSEEK.name: "Who can read it: transformers from 5.23 on drafts with the modules, given a subclass of "
    "{architecture} that lists their layers; vLLM refuses what has more tensors than it knows: use --format hf for it",
    MIMO.name: "Who can read it: engines that know {architecture} with its module, as vLLM and SGLang do",
}
"""What to say of the engines, by the layout of the modules."""
OF_OLD_READERS = ("rope_theta", "rope_scaling")
"""Fields beside `rope_parameters` for readers that do not know it."""
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
    section = changed(recipe.model, num_hidden_layers=num_base_layers(parameters, recipe.model))
    family, settings = settings_of(section)
    layout = _layout_of(recipe, family) if with_modules else None
    sources = sources_of(recipe, parameters, family, layout)
    files = files_of_model(recipe, checkpoint.path)
    settings = _with_source(settings, section, family, files)
    settings |= _frame(recipe, family, layout, dtype) | _ends(recipe, files)
    check_tensors(checkpoint)
    weights = outgoing_weights(MergedReader(checkpoint.reader, checkpoint.recipe), sources, section)
    with watched(f"Exporting {checkpoint.path.name}", total_bytes=2 * checkpoint.model_bytes, show=True) as advance:
        size_bytes = _write(weights, out, dtype, advance, files=files, settings=settings)
    say(f"Exported {checkpoint.path} to {out} as {family}: {size_bytes / 1e6:,.1f} MB of {dtype} weights, checked")
    if left := {parameters[name].owner for name in parameters} - {parameters[name].owner for name in sources}:
        say(f"Left out, because the format has no place for it: {', '.join(sorted(left))}")
    if layout and recipe.heads.draft_vocabulary is not None:
        say("The format has no place for a draft vocabulary: its readers let the modules score every id")
    say(READERS[layout.name if layout else None].format(architecture=architecture_name(section, family)))


def _write(
    weights: OutgoingWeights | ConvertedWeights,
    out: Path,
    dtype: DtypeName,
    advance: Advance,
    *,
    files: Files,
    settings: dict[str, Any],
) -> int:
    """Write the folder; return the bytes of its weights."""
    size_bytes = sum(math.prod(weights.shape(name)) for name in weights.names) * DTYPES[dtype].itemsize
    with atomic_folder(out, CheckpointError, size_bytes=size_bytes) as partial:
        record = write_whole(weights, partial / WHOLE_MODEL, DTYPES[dtype], advance)
        check_whole(weights, ShardReader(partial), advance)
        write_durably(partial / CONFIG_NAME, json.dumps(settings, indent=2, sort_keys=True).encode() + b"\n")
        copy_files({name: path for name, path in files.items() if name != SOURCE_CONFIG}, partial)
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
    norm = FAMILIES["llama"].source("norm.weight")
    if recipe.model.is_foreign or not fits(layout, recipe.heads) or FAMILIES[family].source("norm.weight") != norm:
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
    sources, num_layers = {}, num_base_layers(parameters, recipe.model)
    for name, parameter in parameters.items():
        source = base_source(parameter.place, family) if parameter.place else None
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


def _with_source(settings: dict[str, Any], section: ModelSection, family: Family, files: Files) -> dict[str, Any]:
    """Add what an imported model said of itself: all of it, where it still says the same model."""
    source = {name: value for name, value in read_settings(files, SOURCE_CONFIG).items() if name not in REPLACED}
    if not source or source.get("model_type", family) != settings.get("model_type", family):
        return settings
    if section.hf_config is not None:
        is_same = all(settings.get(key, value) == value for key, value in source.items()) and "model_type" in source
        return source if is_same else settings
    told = section_of(Config(files[SOURCE_CONFIG], source), family)
    if told.model_dump() == (section.model_dump() | {"family": family}):
        return {name: settings[name] for name in OF_OLD_READERS if "rope_theta" in settings} | source
    return {name: value for name, value in source.items() if name not in OF_LAYERS} | settings


def _ends(recipe: Recipe, files: Files) -> dict[str, Any]:
    """Say which ids end and begin a text: the imported model's own, and the end of a document in what was trained on.

    Documents are divided by their end alone, so it stands before the first as well, as in GPT-2.
    """
    if SOURCE_CONFIG in files:
        end = recipe.data.end_of_document  # import has written it down, where there is a tokenizer
        known = end_ids(files, SOURCE_CONFIG) or end_ids(files, GENERATION_CONFIG)
        return {} if end is None or end in known else {"eos_token_id": [*known, end] if known else end}
    try:
        end = recipe_tokenizer(recipe).end_of_document
    except DataError:  # its file is gone, or was never here
        end = recipe.data.end_of_document
    if end is not None and end >= recipe.model.vocab_size:  # a tokenizer that this model was not trained with
        end = None
    return {"bos_token_id": end, "eos_token_id": end}


def _frame(recipe: Recipe, family: Family, layout: ModuleLayout | None, dtype: DtypeName) -> dict[str, Any]:
    """What config.json says beside the settings of the family."""
    told: dict[str, Any] = {
        "architectures": [architecture_name(recipe.model, family)],
        "model_type": (recipe.model.hf_config or {}).get("model_type", family),
        "torch_dtype": TORCH_NAMES[dtype],
    }
    if layout is not None:
        num_modules = recipe.heads.num_offsets - 1
        told |= {"num_nextn_predict_layers": num_modules, "num_mtp_layers": num_modules}
        if family in ("qwen2", "qwen3"):
            told["mtp_layer_types"] = ["full_attention"] * num_modules
    return told
