"""Initial weights of modules of transformers, by that library's own rules, from a seed and the name alone.

A rule may look at more than one parameter, so that whole layers are drawn at once: on the CPU, one at a time.
"""

import copy
import functools
import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mtp_lightning.model.transformers_architecture import Architecture, architecture_of
from mtp_lightning.recipe.schema.root import Recipe

NORMS = ("enorm", "hnorm")
"""Norms of sequential and recursive modules, which are of the type of the final norm."""


def initial_values(name: str, recipe: Recipe) -> Tensor | None:
    """Draw a parameter of a model; None for what transformers has no rule for, as it is not of its modules."""
    architecture = architecture_of(recipe.model)
    path, inner = _unit_of(name, architecture, recipe)
    if path is None:
        return None
    own = name.removesuffix(f".{inner}")
    drawn = _drawn(architecture, path, f"{recipe.run.seed}:{own}").get(inner)
    return None if drawn is None or drawn.isnan().any() else drawn


def _unit_of(name: str, architecture: Architecture, recipe: Recipe) -> tuple[str | None, str]:
    """Find the module of the whole causal model that a parameter is drawn with, and its name in there."""
    names = architecture.names
    layers = f"{names.decoder}.{names.layers}"
    if name.startswith(f"trunk.decoder.{names.layers}."):
        number, _, inner = name.removeprefix(f"trunk.decoder.{names.layers}.").partition(".")
        return f"{layers}.{number}", inner
    if (theirs := names.theirs(name)) is not None:
        owner, _, inner = theirs.rpartition(".")
        return owner, inner
    parts = name.split(".")
    norm = None if names.norm is None else f"{names.decoder}.{names.norm}"
    if parts[-2] in NORMS or name.startswith("unembedding.norms."):
        return norm, parts[-1]
    for cut in range(2, len(parts)) if parts[0] == "heads" else ():
        index = _index_of(parts[cut - 1], len(architecture.layers), recipe.heads.layers_per_head)
        if index is not None and (inner := ".".join(parts[cut:])) in _tensors(architecture.layers[index]):
            return f"{layers}.{index}", inner
    return None, ""


def _index_of(place: str, num_layers: int, layers_per_head: int) -> int | None:
    """Number of the layer that one of a head is like, by its place in the head."""
    is_one = place.isdecimal() and int(place) < layers_per_head
    return max(num_layers - layers_per_head + int(place), 0) if is_one else None


def _tensors(module: nn.Module) -> Mapping[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


@functools.lru_cache(maxsize=2)
@torch.no_grad()
def _drawn(architecture: Architecture, path: str, seed: str) -> Mapping[str, Tensor]:
    """Draw all tensors of a module; NaN where there is no rule."""
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:7], "big")
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(number)
        module = copy.deepcopy(architecture.model.get_submodule(path)).to_empty(device="cpu")
        for tensor in _tensors(module).values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
        module.apply(architecture.model._init_weights)
    return _tensors(module)
