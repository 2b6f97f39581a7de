"""A model with its heads for stock transformers: the next-token model, the heads, and the code that drafts with them.

transformers runs that code where it is told to (`trust_remote_code=True`); nothing here runs any. Without it the
folder is the next-token model.
"""

from dataclasses import replace
from pathlib import Path

import torch

from mtp_lightning.checkpoint.export import folder_code
from mtp_lightning.checkpoint.export.contents import Contents, Refusal, Source
from mtp_lightning.checkpoint.export.trunk import modules_contents, sources_of, trunk_contents
from mtp_lightning.checkpoint.huggingface.configs import listed
from mtp_lightning.checkpoint.huggingface.conversions import outgoing
from mtp_lightning.checkpoint.huggingface.families import FAMILIES, architecture_name, settings_of
from mtp_lightning.checkpoint.huggingface.heads_layout import KINDS, SETTINGS, head_source, heads_settings
from mtp_lightning.checkpoint.huggingface.modules import DEEPSEEK, fits
from mtp_lightning.checkpoint.huggingface.weights import account_of, outgoing_weights
from mtp_lightning.errors import CheckpointError
from mtp_lightning.model.transformers_architecture import architecture_of
from mtp_lightning.model.transformers_library import library
from mtp_lightning.recipe import Recipe
from mtp_lightning.recipe.schema.model import Family, HeadsSection, ModelSection
from mtp_lightning.recipe.trainable import mixing_offsets

CODE = "modeling_mtp.py"
"""File in the folder that transformers runs."""


def refuses_hf_mtp(recipe: Recipe) -> Refusal | None:
    """Say what a model must be, and what this one is; None where the format can hold it."""
    heads, section = recipe.heads, recipe.model
    if section.family == "mimo":
        return Refusal(
            "transformers must have a class for the trunk", "family mimo (model.family=null: one that it has)"
        )
    if heads.num_offsets == 1 or heads.kind not in KINDS:
        found = "one offset, the main head" if heads.num_offsets == 1 else f"heads of the registered kind {heads.kind}"
        return Refusal(f"there must be heads beside the main one, {', '.join(KINDS)}", found)
    if mixing_offsets(recipe):
        return Refusal("heads must read the state of the last layer", "mixtures of layers (adapt.layer_mix)")
    return _refuses_foreign(recipe) if section.is_foreign else None


def _refuses_foreign(recipe: Recipe) -> Refusal | None:
    """The same, of a trunk of transformers' own classes."""
    heads, architecture = recipe.heads, architecture_of(recipe.model)
    trunk, config = f"a trunk of transformers' own classes, {architecture.name},", architecture.config
    has_windows = bool(getattr(config, "sliding_window", None)) or {*(getattr(config, "layer_types", None) or ())} - {
        "full_attention"
    }
    has_rotary = hasattr(architecture.decoder, "rotary_emb") and not getattr(config, "alibi", False)
    if heads.kind in ("sequential", "recursive") and (has_windows or not has_rotary):
        return Refusal(
            f"under heads that read tokens, {trunk} must have rotary positions, and attend to all of the past",
            "layers with windows, or of several types" if has_windows else "other positions",
        )
    if architecture.model._is_stateful or architecture.norm is None:
        found = "none" if architecture.norm is None else "layers that carry a state"
        return Refusal(f"{trunk} must have layers that can be taken back, and a final norm", found)
    has_layers = heads.kind in ("parallel", "chained")
    if has_layers and (heads.layers_from_trunk or (heads.order == "anticausal" and heads.kind == "chained")):
        found = "layers of the trunk (heads.layers_from_trunk), or anticausal heads, which are its last ones"
        return Refusal(f"heads on {trunk} must have layers of their own", found)
    layer = architecture.layers[-1].named_parameters()
    forms = {f"extra_heads.0.layers.0.{name}": (torch.float32, tuple(one.shape)) for name, one in layer}
    if has_layers and any(one.convert for one in outgoing(library(), architecture.model, forms)):
        found = "layers with experts, each saved apart"
        return Refusal(f"layers of heads on {trunk} must be saved as they are computed with", found)
    return None


def hf_mtp_contents(source: Source) -> Contents:
    """The next-token model with its heads, and the code for them.

    Modules that transformers has itself are written as it reads them, under DeepSeek's names; all others by the names
    of `huggingface/heads_layout.py`.
    """
    family, _ = settings_of(source.section)
    heads = source.recipe.heads
    if is_known_to_transformers(heads, source.section, family):
        base = modules_contents(source, DEEPSEEK)
        heads = heads.model_copy(update={"concatenation": DEEPSEEK.heads["concatenation"]})
        return _with_code(base, source, heads, "Modules")
    base = trunk_contents(source)
    own = {name: one.place for name, one in source.parameters.items() if one.place and name not in base.written}
    found = {name: head_source(place, source.section, family) for name, place in own.items()}
    added = {name: one for name, one in found.items() if one is not None}
    sources = sources_of(source.recipe, source.parameters, family, None) | added
    weights = outgoing_weights(source.reader, sources, source.section)
    written, made = account_of(weights, sources)
    base = replace(
        base,
        weights=weights,
        written=written,
        made=made,
        left_out={name: why for name, why in base.left_out.items() if name not in sources},
    )
    return _with_code(base, source, heads, "Heads")


def is_known_to_transformers(heads: HeadsSection, section: ModelSection, family: Family) -> bool:
    """Tell whether transformers has a class for heads, with everything that belongs to them."""
    if heads.draft_vocabulary is not None or heads.unembedding != "shared" or not fits(DEEPSEEK, heads):
        return False
    if section.is_foreign:  # a class that is published with modules, all of whose layers see all of the past
        config = architecture_of(section).config
        return hasattr(config, "num_mtp_layers") and not hasattr(config, "layer_types")
    return FAMILIES[family].source("norm.weight") == FAMILIES["llama"].source("norm.weight")


def _with_code(base: Contents, source: Source, heads: HeadsSection, what: str) -> Contents:
    """Add the code, made for the class of the trunk, and the settings that it builds itself by.

    Raises:
        CheckpointError: A weight that the scores of a head depend on is not in the folder.
    """
    if lost := [name for name in base.left_out if not name.startswith("unembedding.token_order")]:
        expected, hint = "every weight of a head must have a place in the folder", "Export with --format consolidated"
        raise CheckpointError(expected, f"none for {listed(lost)}", hint)
    family, _ = settings_of(source.section)
    trunk = architecture_name(source.section, family)
    name = f"{trunk.removesuffix('ForCausalLM')}With{what}"
    text = (Path(folder_code.__file__).parent / f"with_{what.lower()}.py").read_text(encoding="utf-8")
    text = text.replace(f"LlamaWith{what}", name).replace("LlamaForCausalLM", trunk)
    settings = {
        **base.settings,
        "auto_map": {"AutoModelForCausalLM": f"{Path(CODE).stem}.{name}"},
        SETTINGS: heads_settings(heads, source.section, family),
    }
    return replace(base, settings=settings, texts={**base.texts, CODE: text})
