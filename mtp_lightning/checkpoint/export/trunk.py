"""The next-token model of a checkpoint as an ordinary folder of transformers, with MTP modules where asked."""

from typing import Any

from mtp_lightning.checkpoint.export.contents import Contents, Source
from mtp_lightning.checkpoint.format.carried_files import (
    GENERATION_CONFIG,
    SOURCE_CONFIG,
    Files,
    end_ids,
    read_settings,
)
from mtp_lightning.checkpoint.format.manifest import DtypeName
from mtp_lightning.checkpoint.huggingface.canonical_names import (
    BASE,
    LAYER,
    MODULE,
    Parameter,
    TensorSource,
    num_base_layers,
)
from mtp_lightning.checkpoint.huggingface.configs import Config, listed
from mtp_lightning.checkpoint.huggingface.families import (
    architecture_name,
    base_source,
    section_of,
    settings_of,
)
from mtp_lightning.checkpoint.huggingface.modules import DECLARED, QWEN, ModuleLayout
from mtp_lightning.checkpoint.huggingface.weights import account_of, outgoing_weights
from mtp_lightning.data.loading.corpus import recipe_tokenizer
from mtp_lightning.errors import CheckpointError, DataError
from mtp_lightning.recipe import Recipe
from mtp_lightning.recipe.schema.model import Family, ModelSection

REPLACED = (*DECLARED, "mtp_layer_types", "dtype", "torch_dtype", "auto_map")
"""Fields of an imported model's settings that are written anew, or speak of what is not written."""
OF_LAYERS = ("rope_parameters", "rope_scaling", "rope_theta", "layer_types", "max_window_layers", "head_dim")
"""Fields that can only be right together with others."""
OF_OLD_READERS = ("rope_theta", "rope_scaling")
"""Fields beside `rope_parameters` for readers that do not know it."""
TORCH_NAMES: dict[DtypeName, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def trunk_contents(source: Source) -> Contents:
    """Trunk and main head as transformers has them, in the family that the model fits.

    Raises:
        CheckpointError: No family of transformers is this model, or a weight that the scores depend on has no place.
    """
    return _contents(source, None)


def modules_contents(source: Source, layout: ModuleLayout) -> Contents:
    """The same, with sequential modules beside it, in a layout of theirs.

    Raises:
        CheckpointError: As `trunk_contents`.
    """
    return _contents(source, layout)


def _contents(source: Source, layout: ModuleLayout | None) -> Contents:
    recipe, section = source.recipe, source.section
    family, settings = settings_of(section)
    sources = sources_of(recipe, source.parameters, family, layout)
    settings = _with_source(settings, section, family, source.files)
    settings |= _frame(recipe, family, layout, source.dtype) | _ends(recipe, source.files)
    why = f"the layout of {layout.name if layout else family} has no place for it"
    has_drafts = layout and recipe.heads.draft_vocabulary is not None
    note = "The format has no place for a draft vocabulary: its readers let the modules score every id"
    weights = outgoing_weights(source.reader, sources, section)
    written, made = account_of(weights, sources)
    return Contents(
        weights=weights,
        settings=settings,
        written=written,
        made=made,
        left_out={name: why for name in source.parameters if name not in sources},
        files={name: path for name, path in source.files.items() if name != SOURCE_CONFIG},
        notes=(note,) if has_drafts else (),
    )


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
        if source is None and parameter.place and layout and _may_be_in_module(parameter.place, recipe.model):
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


def _may_be_in_module(place: str, section: ModelSection) -> bool:
    """Tell whether a layer has such a place; those of transformers' own models may have any."""
    match = MODULE.fullmatch(place)
    inside = match[2] if match else ""
    return section.is_foreign or not inside.startswith("layers.") or LAYER.fullmatch(inside) is not None


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
    if layout is QWEN:
        told["mtp_num_hidden_layers"] = 1
    elif layout is not None:
        num_modules = recipe.heads.num_offsets - 1
        told |= {"num_nextn_predict_layers": num_modules, "num_mtp_layers": num_modules}
        if family in ("qwen2", "qwen3"):
            told["mtp_layer_types"] = ["full_attention"] * num_modules
    return told
