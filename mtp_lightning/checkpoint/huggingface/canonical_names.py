"""Canonical parameter names, shared by all import and export formats, and how stored tensors hold parameters."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.model.transformers_architecture import architecture_of
from mtp_lightning.recipe.layer_counts import num_trunk_layers
from mtp_lightning.recipe.schema.model import ModelSection
from mtp_lightning.recipe.schema.root import Recipe

THEIRS = "transformers:"
"""Beginning of a place in a model of family `transformers`; its name in the causal model follows."""
BASE = ("embed_tokens.", "layers.", "norm.", "lm_head.", THEIRS)
"""Beginnings of places in the model that predicts the next token."""
INSIDE = (
    r"(?:self_attn\.[qkvo]_proj|self_attn\.[qk]_norm|mlp\.(?:gate|up|down)_proj|input_layernorm|post_attention_layernorm)"
    r"\.(?:weight|bias)"
)
LAYER = re.compile(rf"layers\.(\d+)\.({INSIDE})")
MODULE = re.compile(r"modules\.(\d+)\.(.+)")
ANY_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
EXTRA = re.compile(r"extra\.(\d+)\.(\d+)\.(.+)")
EXTRA_MATRICES = "extra_lm_heads."
"""Beginning of the places of replicated unembeddings."""


class Parameter(NamedTuple):
    """A parameter of the model."""

    place: str | None
    shape: tuple[int, ...]
    owner: str  # trunk, offset k, or unembedding


def parameters_of(recipe: Recipe) -> dict[str, Parameter]:
    """Describe every parameter of a recipe's model by its name.

    A place is one of `embed_tokens.weight`, `layers.I.NAME` (of the model that predicts the next token: trunk and main
    head), `norm.NAME`, `lm_head.weight`, `modules.D.NAME` (what predicts one more token from the state before and the
    token in between), `extra.J.I.NAME` (layer I of a head beside the main head), `extra.J.map.weight`,
    `extra.J.blocks.I.linear.NAME` (Medusa), `extra_lm_heads.J.NAME`; None for what no format of others has.
    """
    with torch.device("meta"):
        model = MtpModel(recipe)
    offsets = {
        id(parameter): offset
        for offset in reversed(model.heads.offsets)
        for module in model.heads.modules_of(offset)
        for parameter in module.parameters()
    }
    offsets |= {id(mixture.weight): int(offset) for offset, mixture in model.layer_mix.items()}
    path = model.heads.chain(1) if model.heads.modules_of(1) else []
    return {
        name: Parameter(
            _place_of(name, path, recipe),
            tuple(parameter.shape),
            f"offset {offsets[id(parameter)]}" if id(parameter) in offsets else name.partition(".")[0],
        )
        for name, parameter in model.named_parameters()
    }


def layers_prefix(model: ModelSection) -> str:
    """Beginning of every place in a layer of the base model; the number of the layer follows."""
    if not model.is_foreign:
        return "layers."
    names = architecture_of(model).names
    return f"{THEIRS}{names.decoder}.{names.layers}."


def num_base_layers(parameters: Mapping[str, Parameter], model: ModelSection) -> int:
    """Count the layers that a token passes on its way to the next-token scores."""
    beginning = layers_prefix(model)
    places = (parameter.place or "" for parameter in parameters.values())
    return len({place.removeprefix(beginning).partition(".")[0] for place in places if place.startswith(beginning)})


def _place_of(name: str, path: list[int], recipe: Recipe) -> str | None:
    """Find the place of a parameter; `path` lists the offsets whose heads are on the way to offset 1."""
    role, _, rest = name.partition(".")
    if recipe.model.is_foreign and (theirs := architecture_of(recipe.model).names.theirs(name)):
        return THEIRS + theirs
    if role == "layer_mix":
        return None
    if role == "trunk":
        return rest
    if role == "heads":
        return _place_in_heads(rest, path, recipe)
    owner, number, inner = rest.split(".", 2) if rest.count(".") > 1 else (rest, "", "")
    if owner == "norms":
        return f"norm.{inner}" if number == "0" else f"modules.{int(number) - 1}.norm.{inner}"
    if owner != "lm_heads":
        return None
    return f"lm_head.{inner}" if number == "0" else f"{EXTRA_MATRICES}{int(number) - 1}.{inner}"


def _place_in_heads(rest: str, path: list[int], recipe: Recipe) -> str | None:
    kind, depth = recipe.heads.kind, recipe.heads.layers_per_head
    if kind == "recursive":
        return f"modules.0.{rest.removeprefix('block.')}"
    if kind == "sequential":
        return f"modules.{rest.removeprefix('blocks.')}"
    if kind == "linear":
        return f"extra.{rest.removeprefix('blocks.').replace('.', '.map.')}"
    if kind == "medusa":
        return f"extra.{rest.removeprefix('blocks.').replace('.', '.blocks.', 1)}"
    if kind not in ("parallel", "chained"):
        return None
    _, block, layer, inner = rest.split(".", 3)
    offset = int(block) + 1
    if offset in path:
        number = num_trunk_layers(recipe) + path.index(offset) * depth + int(layer)
        return f"{layers_prefix(recipe.model)}{number}.{inner}"
    return f"extra.{offset - 2}.{layer}.{inner}"


def copied_place(place: str, model: ModelSection, layers_per_head: int) -> str | None:
    """Name the place that a head's layers or norm can start as a copy of: the model's own last ones.

    >>> copied_place("extra.1.0.mlp.up_proj.weight", ModelSection(num_hidden_layers=12), 1)
    'layers.11.mlp.up_proj.weight'
    >>> copied_place("modules.0.eh_proj.weight", ModelSection(num_hidden_layers=12), 1)
    """
    first, beginning = model.num_hidden_layers - layers_per_head, layers_prefix(model)
    if extra := EXTRA.fullmatch(place):
        return f"{beginning}{first + int(extra[2])}.{extra[3]}"
    module = MODULE.fullmatch(place)
    if module and (layer := (ANY_LAYER if model.is_foreign else LAYER).fullmatch(module[2])):
        return f"{beginning}{first + int(layer[1])}.{layer[2]}"
    if not module or not module[2].startswith("norm."):
        return None
    if model.is_foreign:
        names = architecture_of(model).names
        return f"{THEIRS}{names.decoder}.{names.norm}.{module[2].removeprefix('norm.')}"
    return module[2]


class TensorLayout(NamedTuple):
    """Both ways between a stored tensor and the parts of it that are parameters of their own, in equal shapes."""

    num_parts: int
    split: Callable[[Tensor, ModelSection], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor], ModelSection], Tensor]

    def stored_shape(self, part: Sequence[int]) -> tuple[int, ...]:
        """Shape of the stored tensor, from that of one part."""
        return (self.num_parts * part[0], *part[1:]) if part else ()


class TensorSource(NamedTuple):
    """Where a parameter lies: in which stored tensor, and which part of it."""

    stored: str
    layout: TensorLayout
    part: int = 0


def _split_heads(stored: Tensor, section: ModelSection) -> Sequence[Tensor]:
    by_head = stored.reshape(section.num_attention_heads, 3, section.resolved_head_dim, *stored.shape[1:])
    return [by_head[:, part].flatten(0, 1) for part in range(3)]


def _join_heads(parts: Sequence[Tensor], section: ModelSection) -> Tensor:
    form = (section.num_attention_heads, section.resolved_head_dim, *parts[0].shape[1:])
    return torch.stack([part.reshape(form) for part in parts], dim=1).flatten(0, 2)


def _to_halves(stored: Tensor, section: ModelSection) -> Sequence[Tensor]:
    by_pair = stored.reshape(-1, section.resolved_head_dim // 2, 2, *stored.shape[1:])
    return [by_pair.transpose(1, 2).flatten(0, 2)]


def _to_pairs(parts: Sequence[Tensor], section: ModelSection) -> Tensor:
    by_half = parts[0].reshape(-1, 2, section.resolved_head_dim // 2, *parts[0].shape[1:])
    return by_half.transpose(1, 2).flatten(0, 2)


def _swapped(stored: Tensor) -> Tensor:
    return torch.cat(stored.chunk(2, dim=1)[::-1], dim=1)


PLAIN = TensorLayout(1, lambda stored, section: [stored], lambda parts, section: parts[0])
"""As it is."""
FUSED = TensorLayout(3, _split_heads, _join_heads)
"""Query, key and value of one head after the other, in one matrix or bias [GPT-NeoX]."""
PAIRED = TensorLayout(1, _to_halves, _to_pairs)
"""Queries or keys whose rotary positions turn neighbouring channels, not those half a head apart [Meta]."""
STACKED = TensorLayout(3, lambda stored, section: stored.chunk(3), lambda parts, section: torch.cat([*parts]))
"""Query, key and value of all heads one after the other [llama.cpp]."""
SWAPPED = TensorLayout(1, lambda stored, section: [_swapped(stored)], lambda parts, section: _swapped(parts[0]))
"""A projection from 2D to D with its two inputs in the other order."""
