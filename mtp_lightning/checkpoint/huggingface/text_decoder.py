"""A folder as transformers' own classes read it: its text decoder, and which tensors make which parameter."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from mtp_lightning.checkpoint.format.tensors import Entry
from mtp_lightning.checkpoint.huggingface.configs import MOST_LAYERS, Config, check_plain_numbers, named
from mtp_lightning.checkpoint.huggingface.conversions import Conversion, incoming
from mtp_lightning.checkpoint.huggingface.modules import Native, declared_modules, layout_of, native_modules
from mtp_lightning.errors import CheckpointError
from mtp_lightning.files.untrusted import described
from mtp_lightning.model.transformers_architecture import COMPARED, Architecture, architecture_of
from mtp_lightning.model.transformers_library import library
from mtp_lightning.recipe.schema.model import SETTLED, ModelSection, settled_by

COUNTS = re.compile(r"(num_.*layers|n_layers?|depth|.*_depth|num_.*experts|n_.*experts|num_hidden_groups)")
"""Names of settings that say how often something is built."""
NOT_OF_THE_MODEL = (
    *("_name_or_path", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_internal"),
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
)
"""Settings that are not kept: they speak of the folder, or of how it is run."""
TEXT_TYPES = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text"), "qwen2"),
    **dict.fromkeys(("qwen3_vl_text", "qwen3_omni_moe_text"), "qwen3"),
    "qwen3_vl_moe_text": "qwen3_moe",
    "emu3_text_model": "llama",
}
"""Text decoders without a class of their own, and what computes the same for text alone."""
EXISTS = "Choose a decoder that predicts the next token (LlamaForCausalLM, Gemma3ForCausalLM, MixtralForCausalLM, …)"


GENERIC = ("id2label", "label2id", "problem_type", "return_dict", "chunk_size_feed_forward")
"""Settings of every model of transformers that say nothing of a decoder."""


@dataclass(frozen=True)
class TextDecoder:
    """The part of a folder's model that predicts the next token.

    Attributes:
        section: its settings, as a model of family `transformers`.
        conversions: how stored tensors make its parameters and buffers, under the names of its own class.
        left: stored tensors that have no place in it.
        notes: what was left out on purpose.
    """

    section: ModelSection
    conversions: list[Conversion]
    left: list[str]
    notes: tuple[str, ...] = ()

    @property
    def architecture(self) -> Architecture:
        """Its class and the parts of it."""
        return architecture_of(self.section)


def open_text_decoder(config: Config, entries: Mapping[str, Entry]) -> TextDecoder:
    """Find the text decoder of a folder, by its settings and the headers of its files.

    Raises:
        CheckpointError: the installed transformers does not know the model, it has no causal decoder that can be a
            trunk, it is quantized, its code lies in the folder itself, or its tensors do not fit its settings.
    """
    _check_counts(config, entries)
    whole = _config_of(config)
    check_plain_numbers(config)
    if getattr(whole, "is_encoder_decoder", False):
        raise _no_decoder(config, "an encoder-decoder, whose decoder reads the encoder's states")
    with understood(config):
        text = whole.get_text_config(decoder=True)
        settings = _settings_of(text)
    settings["model_type"] = TEXT_TYPES.get(text.model_type, text.model_type)
    if text is not whole:
        settings["tie_word_embeddings"] = whole.tie_word_embeddings
        settings.get("rope_parameters", {}).pop("mrope_section", None)  # positions of a text are the same on all axes
    _check_class(config, settings)
    with understood(config):
        section = ModelSection.model_validate({"family": "transformers", "hf_config": settings})
    decoder = TextDecoder(section, [], [])
    model = decoder.architecture.model
    forms = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    with understood(config):
        if text is whole:
            conversions, left = incoming(library(), model, forms)
            return _without_ignored(replace(decoder, conversions=conversions, left=left))
        wrapper = _wrapper_of(config, whole)
        conversions, left = incoming(library(), wrapper, forms)
    rename, inside = _renaming(wrapper, decoder.architecture), {*model.state_dict()}
    taken = [one.renamed(rename) for one in conversions if {*map(rename, one.forms)} <= inside]
    num_other = sum(len(one.sources) for one in conversions) - sum(len(one.sources) for one in taken)
    note = f"The text part of {type(wrapper).__name__}: {num_other} tensors of its other parts are left out"
    return _without_ignored(replace(decoder, conversions=taken, left=left, notes=(note,)))


def with_modules(
    decoder: TextDecoder, config: Config, entries: Mapping[str, Entry]
) -> tuple[TextDecoder, Native | None]:
    """Add a folder's modules, the layer of each made of its tensors as the last layer of the decoder is of its own.

    Args:
        decoder: the decoder without them.
        config: its settings.
        entries: the modules' tensors; if there are none, there are no modules.

    Raises:
        CheckpointError: experts are missing, or do not fit together.
    """
    architecture, num_layers = decoder.architecture, decoder.section.num_hidden_layers
    layout = layout_of(entries)
    if layout is None:
        return decoder, None
    if other := _other_layers(architecture):
        note = f"The folder's own modules are left out: here their layer is like the last one; the settings say {other}"
        return replace(decoder, notes=(*decoder.notes, note)), None
    last = f"{architecture.names.decoder}.{architecture.names.layers}.{num_layers - 1}."
    conversions: list[Conversion] = []
    for module in range(layout.count(entries)):
        own = layout.layer(module, num_layers)
        inside = {name: one for name, one in entries.items() if name.startswith(own)}
        forms = {last + name.removeprefix(own): (one.dtype, one.shape) for name, one in inside.items()}

        def back(name: str, own: str = own) -> str:
            return own + name.removeprefix(last)

        with understood(config):
            made, _ = incoming(library(), architecture.model, forms)
        conversions += [one.renamed(back, back) for one in made]
    left = {*entries} - {name for one in conversions for name in one.sources}
    native = native_modules(entries, num_layers, declared_modules(config), default=layout)
    return (
        replace(decoder, conversions=[*decoder.conversions, *conversions], left=[*decoder.left, *sorted(left)]),
        native and replace(native, apart=layout.beginnings(entries)),
    )


def _other_layers(architecture: Architecture) -> str | None:
    """Say what type of layer modules have by the settings, if it is not that of the last layer."""
    for name in ("layer_types", "mlp_layer_types"):
        own, theirs = (getattr(architecture.config, key, None) for key in (name, f"mtp_{name}"))
        if own and theirs and {*theirs} != {own[-1]}:
            return f"mtp_{name} {named(theirs[0])} behind a last layer of {named(own[-1])}"
    return None


def _check_counts(config: Config, entries: Mapping[str, Entry]) -> None:
    """Check that nothing is to be built more often than the files have tensors, before anything is built."""
    most = min(len(entries), MOST_LAYERS)
    for values in (config.values, *(one for one in config.values.values() if isinstance(one, dict))):
        for name, value in values.items():
            limit = MOST_LAYERS if "expert" in name else most
            if isinstance(value, int) and COUNTS.fullmatch(name) and value > limit:
                raise config.refused(
                    "the settings must ask for no more than the weights hold",
                    f"{name}: {value:,} beside {len(entries):,} tensors",
                    "Take settings and weights from the same model",
                )


def _config_of(config: Config) -> Any:
    """Build the settings of transformers."""
    known, told = library().CONFIG_MAPPING, config.get("model_type")
    if not isinstance(told, str) or told not in known:
        raise _unknown(config, told)
    if told == "mistral" and "layer_types" in config.values:
        told = "ministral"  # as AutoConfig takes it: MistralForCausalLM has one type of layer
    with understood(config):
        values = library().PreTrainedConfig._decode_special_floats(config.values)  # infinities, written as objects
        kept = {name: one for name, one in values.items() if name not in NOT_OF_THE_MODEL}
        return known[told].from_dict(kept | {"model_type": told})


def _unknown(config: Config, told: Any) -> CheckpointError:
    version = library().__version__
    if config.get("auto_map"):
        return config.refused(
            "the code of a model must be transformers' own, not a program in the folder",
            f"code of its own (auto_map), and model_type {described(told)}, which transformers {version} does not know",
            "Install a transformers that knows it (pip install -U transformers), or choose another model",
        )
    return config.refused(
        f"the installed transformers ({version}) must know the model",
        f"model_type {described(told)}",
        "Install a newer one (pip install -U transformers), or choose another model",
    )


def _no_decoder(config: Config, what: str) -> CheckpointError:
    told = named(config.get("model_type", "no model_type"))
    return config.refused("a model to import must be a causal decoder", f"{told}, {what}", EXISTS)


def _check_class(config: Config, settings: dict[str, Any]) -> None:
    known, told = library().CONFIG_MAPPING, settings["model_type"]  # its `get` knows nothing before it is loaded
    kind = known[told] if told in known else None  # noqa: SIM401
    if kind is None or library().MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None) is None:
        raise _no_decoder(config, "for which transformers has no class that predicts the next token from text alone")


def _settings_of(text: Any) -> dict[str, Any]:
    """Write settings out, those included that the folder leaves to their defaults, or to be computed of others."""
    told: dict[str, Any] = json.loads(json.dumps(text._encode_special_floats(text.to_dict()), default=str))
    settled = settled_by(told)
    computed = {name: getattr(text, name, None) for name in COMPARED if name not in settled}
    told |= {name: value for name, value in computed.items() if type(value) is SETTLED[name][0]}
    return {name: value for name, value in told.items() if name not in (*NOT_OF_THE_MODEL, *GENERIC)}


def _wrapper_of(config: Config, whole: Any) -> Any:
    """Build the class that has more parts than the text decoder, on the meta device."""
    names = config.get("architectures", default=[])
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    tables = (library().MODEL_FOR_MULTIMODAL_LM_MAPPING, library().MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    choices = (getattr(library(), name, None), *(table.get(type(whole), None) for table in tables))
    found = [one for one in choices if isinstance(one, type) and getattr(one, "config_class", None) is type(whole)]
    if not found:
        raise _no_decoder(config, f"for which transformers has no class {name}")
    with torch.device("meta"), library().initialization.no_init_weights():
        return found[0](whole)


def _renaming(wrapper: Any, architecture: Architecture) -> Callable[[str], str]:
    """Say what a parameter of a wrapper is called in its text decoder's own class."""
    own = wrapper.config.get_text_config(decoder=True)
    parts = [name for name, one in wrapper.named_modules() if name and getattr(one, "config", None) is own]
    part = min(parts, key=len)
    inside = "" if hasattr(wrapper.get_submodule(part), "lm_head") else f"{architecture.names.decoder}."
    return lambda name: inside + name.removeprefix(f"{part}.") if name.startswith(f"{part}.") else name


def _without_ignored(decoder: TextDecoder) -> TextDecoder:
    """Leave out what the class of transformers says that it ignores."""
    model = decoder.architecture.model
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    ignored = [name for name in decoder.left if any(pattern.search(name) for pattern in patterns)]
    if not ignored:
        return decoder
    note = f"Not read, as {type(model).__name__} does not read it either: {ignored[0]}, {len(ignored)} tensors in all"
    left = [name for name in decoder.left if name not in {*ignored}]
    return replace(decoder, left=left, notes=(*decoder.notes, note))


@contextmanager
def understood(config: Config) -> Iterator[None]:
    """Turn whatever classes of others make of wrong settings or tensors into an error about the folder."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        found = f"{' '.join(lines)[:200]} ({type(error).__name__} of transformers)"
        raise config.impossible(found) from None
