"""What is known of a decoder of transformers before any of its weights is there: its parts, their names and classes.

Nothing here knows an architecture by its name. The whole causal model is built on the meta device, its parts are found
by what they are, and a copy without layers and with a small vocabulary is then computed both ways, by transformers' own
forward and by ours. What does not agree is refused.
"""

import copy
import functools
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mtp_lightning.errors import CheckpointError
from mtp_lightning.losses.logit_map import LogitMap
from mtp_lightning.model.transformers_constants import constants_of, restore_constants
from mtp_lightning.model.transformers_library import library
from mtp_lightning.model.transformers_names import Names, further_parts, names_of, refused
from mtp_lightning.model.transformers_probe import TrialLayer, floats, probe
from mtp_lightning.recipe.schema.model import ModelSection

NEEDED = ("hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings")
COMPARED = (*NEEDED, "num_attention_heads")
"""Fields that transformers reads as the recipe does; layers that carry a state need no heads."""
SMALL_VOCABULARY = 16
TOLERANCE = 1e-5
RANDOM = re.compile("dropout|pdrop|layer_?drop|drop_?path|drop_rate|jitter")
"""In names of settings that draw random numbers in training: 0 here, as the three backward orders must agree."""
NOT_RANDOM = {("phimoe", "router_jitter_noise")}  # how near experts must be to be chosen from
NOT_SETTINGS = ("architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "quantization_config")
CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Settings that say what scores are softly capped by."""
LAYER_TYPES = ("layers_block_type", "layer_types")
"""Settings that list the type of each layer."""
TOKEN_SETTINGS = ("pad_token_id", "bos_token_id", "eos_token_id")


class Architecture:
    """A causal decoder of transformers: settings, classes and names of its parts.

    Attributes:
        config: settings, as an object of transformers.
        model: the whole causal model, on the meta device.
        names: where its parts lie.
        logit_map: what it does to the scores of its unembedding.
        output: how one of its layers returns its state: alone, or first of so many values.
        masks_documents: whether what each layer attends to can be kept inside a document.
        hides_by_true: whether a mask of truth values says what is hidden, not what is seen.
        lacks_masks: whether that is so although layers are not told of them, as all of them mix positions by a softmax.
        embedding_scale: what embedded tokens are multiplied by before the decoder's own forward takes them.
        unread: parameters of the decoder that a text does not reach, as those that read images.
        reads_embedding: whether the first layer then reads them as they are.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.config = _config_of(settings)
        self.model = _on_meta(self.config)
        if absent := [field for field in NEEDED if not hasattr(self.config, field)]:
            raise refused(self.name, f"{type(self.config).__name__} without {absent[0]}")
        self.names = names_of(self.model, self.config)
        with torch.device("cpu"):
            self.output, self.logit_map, trial = _checked(self.config, self.names)
            eager = trial if trial.has_masks else _checked(self.config, self.names, attention="eager")[2]
        self.reads_embedding, self.hides_by_true = trial.reads_embedding, trial.hides_by_true
        self.embedding_scale, self.unread = trial.embedding_scale, trial.unread
        self.masks_documents, self.lacks_masks = eager.has_masks, not trial.has_masks

    @property
    def name(self) -> str:
        """Class of the causal model."""
        return type(self.model).__name__

    @property
    def decoder(self) -> nn.Module:
        """The decoder, on the meta device."""
        return cast(nn.Module, self.model.get_submodule(self.names.decoder))

    @property
    def layers(self) -> nn.ModuleList:
        """Its layers, on the meta device."""
        return cast(nn.ModuleList, self.decoder.get_submodule(self.names.layers))

    @property
    def norm(self) -> nn.Module | None:
        """Its final norm, on the meta device."""
        return None if self.names.norm is None else self.decoder.get_submodule(self.names.norm)

    @property
    def lm_head(self) -> nn.Linear:
        """Its unembedding, on the meta device."""
        return cast(nn.Linear, self.model.get_submodule(self.names.lm_head))

    def build_decoder(self, num_layers: int) -> nn.Module:
        """Build the decoder with the first layers and without the final norm; nothing is initialised."""
        with self.quietly():
            decoder = type(self.decoder)(self.config)
        layers = decoder.get_submodule(self.names.layers)
        setattr(decoder, self.names.layers, nn.ModuleList(list(layers)[:num_layers]))  # type: ignore[call-overload]
        if self.names.norm is not None and has_weights(self.norm):
            setattr(decoder, self.names.norm, nn.Identity())
        return decoder

    def build_layer(self, index: int) -> nn.Module:
        """Build one more layer like the one of an index.

        Raises:
            CheckpointError: Layers of this class need more than settings, a number and a type.
        """
        kind = type(self.layers[index])
        further = [name for name in inspect.signature(kind.__init__).parameters if name not in ("self", "config")]
        types = next((told for name in LAYER_TYPES if (told := getattr(self.config, name, None))), None)
        typed = {name: types[index] for name in ("layer_type", "block_type") if types and name in further[1:]}
        try:
            with self.quietly():
                layer = kind(self.config, *([index] if further else []), **typed)
            if layer.state_dict().keys() != self.layers[index].state_dict().keys():
                raise TypeError(f"built by itself, layer {index} has other tensors")
            self._add_constants(layer, index)
            return layer
        except Exception as error:
            raise CheckpointError(
                "heads.kind must be one without layers for a model whose layers are not built of settings and a number",
                f"{kind.__name__} of {self.name}: {type(error).__name__}: {error}",
                "Choose heads.kind=medusa, or linear (mtp import --kind medusa)",
            ) from error

    def _add_constants(self, layer: nn.Module, index: int) -> None:
        """Give a layer the buffers that the decoder gives to its own."""
        own = dict(layer.named_buffers())
        for path, _ in self.layers[index].named_buffers():
            if path not in own:
                owner, _, name = path.rpartition(".")
                value = self.constants[f"{self.names.layers}.{index}.{path}"]
                layer.get_submodule(owner).register_buffer(name, value.clone(), persistent=False)

    @functools.cached_property
    def constants(self) -> dict[str, Tensor]:
        """All buffers of the decoder, by name; NaN where no rule of transformers sets one."""
        with torch.device("meta"), self.quietly():
            decoder = type(self.decoder)(self.config)
        return constants_of(self.model, decoder)

    def build_norm(self) -> nn.Module:
        """Build one more norm like the final one."""
        norm = nn.Identity() if self.norm is None else copy.deepcopy(self.norm)
        like = torch.empty(0)  # as whatever is built around it: on the meta device, or of ZeRO-3's type
        return norm.to_empty(device=like.device).to(like.dtype)

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Leave weights as they are, while modules are built."""
        with _quietly():
            yield


def architecture_of(section: ModelSection) -> Architecture:
    """Return the architecture of a recipe's model, the same for equal settings.

    Raises:
        CheckpointError: transformers is not there, or the settings are of no decoder that can be a trunk.
    """
    architecture = _architecture(json.dumps(section.hf_config, sort_keys=True))
    for field in COMPARED:
        given = getattr(section, field)
        read = getattr(architecture.config, field, given)
        if given != read:
            raise CheckpointError(
                f"model.{field} must be what transformers reads out of model.hf_config",
                f"{given} beside {read} as {type(architecture.config).__name__} reads it",
                f"Set model.{field} to {read}, or write it into model.hf_config",
            )
    return architecture


@functools.lru_cache(maxsize=8)
def _architecture(settings: str) -> Architecture:
    return Architecture(json.loads(settings))


def _config_of(settings: Mapping[str, Any]) -> Any:
    kind = settings.get("model_type")
    known = library().CONFIG_MAPPING
    if not isinstance(kind, str) or kind not in known:
        raise CheckpointError(
            "model.hf_config must have a model_type that the installed transformers knows",
            f"model_type = {kind!r}, transformers {library().__version__}",
            "Write the model's config.json there whole, or install a newer transformers",
        )
    plain = library().PreTrainedConfig._decode_special_floats(dict(settings))  # infinities, written as objects
    kept = {name: value for name, value in plain.items() if name not in NOT_SETTINGS}
    try:
        config = known[kind](**kept)
    except Exception as error:  # whatever a class of transformers makes of a setting that it cannot use
        raise CheckpointError(
            f"model.hf_config must be settings that transformers' {known[kind].__name__} takes",
            f"{type(error).__name__}: {error}",
            "Write the model's config.json there as it is",
        ) from error
    _draw_nothing(config)
    config.use_cache = False
    return config


def _draw_nothing(config: Any) -> None:
    """Set what draws random numbers to 0, in settings of parts, too."""
    for name, value in list(vars(config).items()):
        if isinstance(value, library().PreTrainedConfig):
            _draw_nothing(value)
        elif RANDOM.search(name) and type(value) in (int, float) and (config.model_type, name) not in NOT_RANDOM:
            setattr(config, name, type(value)(0))


@contextmanager
def _quietly() -> Iterator[None]:
    with library().initialization.no_init_weights():
        yield


def _on_meta(config: Any, attention: str | None = None) -> Any:
    """Build the causal model on the meta device, with `attention` as None means: sdpa where the model can."""
    automatic = library().AutoModelForCausalLM
    kind = automatic._model_mapping.get(type(config), None)
    if kind is None:
        raise refused(type(config).__name__, "transformers has no class that predicts the next token with it")
    kind = kind[0] if isinstance(kind, tuple) else kind
    attention = attention or ("sdpa" if kind._supports_sdpa else "eager")
    try:
        with torch.device("meta"), _quietly():
            return automatic.from_config(config, attn_implementation=attention)
    except Exception as error:
        raise refused(kind.__name__, f"{type(error).__name__}: {error}") from error


class Trial(NamedTuple):
    """What the decoder's own forward hands to its layers."""

    has_masks: bool  # for each layer a mask of (B, 1, T, T)
    reads_embedding: bool
    hides_by_true: bool
    embedding_scale: float
    unread: frozenset[str] = frozenset()  # parameters of the decoder that a text does not reach


def _checked(config: Any, names: Names, *, attention: str | None = None) -> tuple[int, LogitMap, Trial]:
    """Compare our way of computing scores with transformers' own, on a copy without layers."""
    config = copy.deepcopy(config)
    config.vocab_size = min(config.vocab_size, SMALL_VOCABULARY)
    for name in TOKEN_SETTINGS:  # beyond the small vocabulary
        with suppress(Exception):  # which a class may raise of any kind, where a token must be there
            setattr(config, name, None)
    config.output_router_logits = False
    model = _on_meta(config, attention)
    name = type(model).__name__
    decoder = model.get_submodule(names.decoder)
    meta_layers = list(decoder.get_submodule(names.layers))
    decoder._modules[names.layers] = nn.ModuleList()
    fill_trial(model)
    tokens = torch.arange(12).view(3, 4) % config.vocab_size
    embedding = model.get_submodule(f"{names.decoder}.{names.embedding}")
    positions = torch.arange(4).expand(3, 4)
    failures = []
    for output in (0, 1, 2):
        calls: list[dict[str, Any]] = []
        layers = [TrialLayer(layer, number, output, calls) for number, layer in enumerate(meta_layers)]
        decoder._modules[names.layers] = nn.ModuleList(layers)
        try:
            with torch.no_grad():
                wanted = model(input_ids=tokens, use_cache=False).logits
                embedded, first = embedding(tokens), calls[0][""]
                scale = _embedding_scale(decoder, names, embedded, positions, first, output=output)
                ours, trial = _ours(decoder, names, embedded * scale, positions, output, scale=scale)
                scores = model.get_submodule(names.lm_head)(
                    ours if names.norm is None else decoder.get_submodule(names.norm)(ours)
                )
        except Exception as error:  # a layer's output of the wrong kind, or whatever else this model cannot do
            failures.append(f"with stand-ins in place of its layers, {type(error).__name__}: {error}")
            continue
        if wanted.shape != scores.shape:
            failures.append(f"scores of the shape {list(wanted.shape)} where ours are {list(scores.shape)}")
            continue
        cap = next((cap for name in CAPS if (cap := getattr(config, name, None))), None)
        logit_map = LogitMap(_scale(wanted, scores, cap, config), cap)
        difference = (logit_map(scores) - wanted).abs().max() / wanted.abs().max()
        if difference <= TOLERANCE:
            if _reads_tokens(decoder, names, embedding(tokens), positions, output):
                raise refused(name, "layers that read embedded tokens besides the state of the layer before")
            return output, logit_map, trial._replace(unread=_unread(decoder, names, tokens, positions, output))
        failures.append(f"scores that differ from transformers' own by {float(difference):.1e} of the largest")
    raise refused(name, (failures[-1] if "differ" in failures[-1] else failures[0]) + further_parts(model, names))


def _embedding_scale(
    decoder: nn.Module, names: Names, embedded: Tensor, positions: Tensor, wanted: Tensor, *, output: int
) -> float:
    """Measure what embedded tokens are multiplied by if the decoder embeds them itself."""
    layers = {names.layers: cast(nn.ModuleList, decoder.get_submodule(names.layers))}
    first, _ = probe(decoder, layers, embedded.clone(), positions, output=output)
    if first.shape != wanted.shape or torch.equal(first, wanted):
        return 1.0
    scale = _meant(float((wanted * first).sum() / first.square().sum()), decoder.config)
    return scale if torch.allclose(scale * first, wanted) else 1.0


def _ours(
    decoder: nn.Module, names: Names, embedded: Tensor, positions: Tensor, output: int, *, scale: float
) -> tuple[Tensor, Trial]:
    """Compute the last state of trial layers our way."""
    layers = cast(nn.ModuleList, decoder.get_submodule(names.layers))
    as_given, norms = embedded.clone(), {}
    if names.norm is not None and has_weights(decoder.get_submodule(names.norm)):
        norms = {names.norm: decoder.get_submodule(names.norm)}
        decoder._modules[names.norm] = nn.Identity()  # as in a trunk: some norm embedded tokens with it, too
    first, calls = probe(decoder, {names.layers: layers}, embedded, positions, output=output)
    decoder._modules.update(norms)
    hidden, reads_embedding = first, first is embedded and torch.equal(first, as_given)
    for layer, call in zip(layers, calls, strict=True):
        hidden = cast(TrialLayer, layer).change(hidden, call)
    _, packed = probe(decoder, {names.layers: layers}, embedded, positions % 2, output=output)
    masks = [call.get("attention_mask") for call in packed]
    seen = [mask for mask in masks if isinstance(mask, Tensor) and mask.dim() == 4]
    hides = bool(seen) and seen[0].dtype == torch.bool and bool(seen[0][0, 0, 0, -1])
    return hidden, Trial(len(seen) == len(masks), reads_embedding, hides, scale)


@torch.no_grad()
def _reads_tokens(decoder: nn.Module, names: Names, embedded: Tensor, positions: Tensor, output: int) -> bool:
    """Tell whether what layers are given beside their state depends on the tokens: a trunk prepares it without them."""
    layers = {names.layers: cast(nn.ModuleList, decoder.get_submodule(names.layers))}
    given = [
        [*floats(value for call in probe(decoder, layers, one, positions, output=output)[1] for value in call.values())]
        for one in (embedded.clone(), torch.zeros_like(embedded))
    ]
    return not all(map(torch.equal, *given))


@torch.enable_grad()
def _unread(decoder: nn.Module, names: Names, tokens: Tensor, positions: Tensor, output: int) -> frozenset[str]:
    """Name the parameters that nothing depends on which layers are given, as those that read images."""
    layers = {names.layers: cast(nn.ModuleList, decoder.get_submodule(names.layers))}
    first, calls = probe(decoder, layers, decoder.get_submodule(names.embedding)(tokens), positions, output=output)
    total = sum((one.sum() for one in floats(value for call in calls for value in call.values())), start=first.sum())
    norm = "" if names.norm is None else f"{names.norm}."
    named = [(name, one) for name, one in decoder.named_parameters() if not norm or not name.startswith(norm)]
    reached = torch.autograd.grad(total, [one for _, one in named], allow_unused=True)
    return frozenset(name for (name, _), gradient in zip(named, reached, strict=True) if gradient is None)


def has_weights(norm: nn.Module | None) -> bool:
    """Tell whether a norm has weights, which the unembedding owns; one without may norm embedded tokens as well."""
    return norm is not None and next(norm.parameters(), None) is not None


def _scale(wanted: Tensor, scores: Tensor, cap: float | None, config: Any) -> float:
    """Measure what scores are multiplied by; a setting of that size, or one over it, is what is meant."""
    if cap is not None:
        wanted = cap * torch.atanh(wanted / cap)
    return _meant(float((wanted * scores).sum() / scores.square().sum()), config)


def _meant(measured: float, config: Any) -> float:
    settings = [float(value) for value in vars(config).values() if isinstance(value, int | float) and value > 0]
    meant = [1.0, *settings, *(1 / value for value in settings)]
    return next((value for value in meant if abs(measured / value - 1) < TOLERANCE), measured)


@torch.no_grad()
def fill_trial(model: Any) -> None:
    """Give the parts of a model on the meta device memory and values, as in a fresh one, weights at random."""
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    restore_constants(model, model)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.get_output_embeddings().weight.mul_(0.5 / model.config.hidden_size**0.5)  # far from where a cap is flat
