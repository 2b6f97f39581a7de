"""Tensors that an engine's layout has otherwise than the model: made of others when they are written."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from mtp_lightning.checkpoint.export.contents import Contents, Refusal, Source
from mtp_lightning.checkpoint.export.trunk import sources_of
from mtp_lightning.checkpoint.format.reader_view import WeightSource
from mtp_lightning.checkpoint.huggingface.canonical_names import MODULE, TensorSource
from mtp_lightning.checkpoint.huggingface.families import settings_of
from mtp_lightning.checkpoint.huggingface.modules import ModuleLayout
from mtp_lightning.recipe import Recipe
from mtp_lightning.recipe.schema.model import Family, HeadsSection, ModelSection
from mtp_lightning.recipe.trainable import mixing_offsets

ALL_IDS = "The format has no place for a draft vocabulary: its readers let the heads score every id"
_FRAME = ("torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")


class Made(NamedTuple):
    """A tensor that is computed when it is written."""

    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[tuple[int, Tensor]]]


@final
class RewrittenWeights:
    """Weights of which some are replaced, and others added; of those, one is in memory at a time."""

    def __init__(self, weights: WeightSource, made: Mapping[str, Made]) -> None:
        self._weights, self._made = weights, made
        self.names = (*(name for name in weights.names if name not in made), *made)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._made[name].shape if name in self._made else self._weights.shape(name)

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Read or make a tensor's values in consecutive blocks."""
        if name in self._made:
            yield from self._made[name].blocks()
        else:
            yield from self._weights.blocks(name)


def computed(shape: tuple[int, ...], make: Callable[[], Tensor]) -> Made:
    """A tensor that is whole in memory when it is written."""
    return Made(shape, lambda: iter([(0, make().flatten().contiguous())]))


def filled(value: float, *shape: int) -> Made:
    """A tensor of one value."""
    return computed(shape, lambda: torch.full(shape, value))


def row_by_row(weights: WeightSource, name: str, change: Callable[[Tensor], Tensor]) -> Made:
    """A matrix whose rows are changed some at a time: `change` maps (R, D) fp64 to (R, D)."""
    return Made(weights.shape(name), lambda: ((at, change(rows).flatten()) for at, rows in _rows(weights, name)))


def rows_at(weights: WeightSource, name: str, ids: Sequence[int]) -> Made:
    """Rows of a matrix by their numbers, ascending: (V, D) -> (V', D)."""
    numbers = torch.tensor([*ids])

    def blocks() -> Iterator[tuple[int, Tensor]]:
        width = weights.shape(name)[1]
        for at, rows in _rows(weights, name):
            first = at // width
            before, end = torch.searchsorted(numbers, torch.tensor([first, first + len(rows)])).tolist()
            if end > before:
                yield before * width, rows[numbers[before:end] - first].flatten()

    return Made((len(ids), weights.shape(name)[1]), blocks)


def _rows(weights: WeightSource, name: str) -> Iterator[tuple[int, Tensor]]:
    """Read a matrix in blocks of whole rows, each with the number of its first value."""
    width, start, left = weights.shape(name)[1], 0, torch.empty(0, dtype=torch.float64)
    for _, values in weights.blocks(name):
        joined = torch.cat((left, values.double()))
        whole = len(joined) // width * width
        left = joined[whole:]
        if whole:
            yield start, joined[:whole].view(-1, width)
            start += whole


def read_whole(weights: WeightSource, name: str) -> Tensor:
    """Read a tensor in its shape, as fp64: what is computed of it is rounded once, when it is written."""
    return torch.cat([values for _, values in weights.blocks(name)]).view(weights.shape(name)).double()


def refusal(expected: str, wrong: Mapping[str, bool]) -> Refusal | None:
    """Refuse a model of which something wrong is true."""
    found = [what for what, is_so in wrong.items() if is_so]
    return Refusal(expected, ", ".join(found)) if found else None


def not_dense(recipe: Recipe) -> dict[str, bool]:
    """What no trunk of Llama's kind has, and heads that do not read its last layer or have matrices of their own."""
    model = recipe.model
    return {
        "a trunk of transformers' own classes": model.is_foreign,
        "LayerNorm": model.norm != "rms",
        "a GELU feed-forward": model.mlp != "swiglu",
        "a parallel residual": model.parallel_residual,
        "biases in the feed-forward": model.mlp_bias,
        "partial rotary positions": model.partial_rotary_factor != 1.0,
        "mixtures of layers (adapt.layer_mix)": bool(mixing_offsets(recipe)),
        "no heads beyond the main one": recipe.heads.num_offsets == 1,
    }


def not_modules(heads: HeadsSection) -> dict[str, bool]:
    """What a layout with one DeepSeek module of one layer cannot hold."""
    return {
        f"{heads.kind} heads": heads.kind not in ("sequential", "recursive"),
        f"{heads.layers_per_head} layers in each head": heads.layers_per_head != 1,
        "an unembedding matrix for each offset": heads.unembedding == "replicated",
    }


def first_module(source: Source, layout: ModuleLayout) -> dict[str, TensorSource]:
    """Find where the parameters of trunk, main head and first module go, under Llama's names and a layout's."""
    places = {name: MODULE.fullmatch(one.place or "") for name, one in source.parameters.items()}
    sources = sources_of(source.recipe, source.parameters, "llama", layout)
    return {name: one for name, one in sources.items() if not ((place := places[name]) and place[1] != "0")}


def left_out(source: Source, written: Mapping[str, Any], layout: str) -> dict[str, str]:
    """Say why the other parameters are left out."""
    why = f"the layout of {layout} has no place for it"
    return {name: why for name in source.parameters if name not in written}


def notes_on(recipe: Recipe) -> tuple[str, ...]:
    """What is to be said of any layout without a draft vocabulary."""
    return (ALL_IDS,) if recipe.heads.draft_vocabulary is not None else ()


def settings_as(source: Source, trunk: Contents, family: Family, **fields: Any) -> dict[str, Any]:
    """Write the next-token model as settings of a family, with changed fields; type and end of texts as in `trunk`."""
    section: ModelSection = source.section.model_copy(update={"family": family, **fields})
    kept = trunk.settings
    return settings_of(section)[1] | {name: kept[name] for name in _FRAME if name in kept}
