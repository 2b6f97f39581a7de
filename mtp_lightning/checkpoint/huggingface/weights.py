"""Weights on their way in or out, under the names of the other side; one tensor is whole in memory at most."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, final

import torch
from torch import Tensor

from mtp_lightning.checkpoint.convert.merge_lora import MergedReader
from mtp_lightning.checkpoint.huggingface.canonical_names import PLAIN, TensorLayout, TensorSource
from mtp_lightning.checkpoint.huggingface.conversions import Conversion, outgoing
from mtp_lightning.checkpoint.huggingface.folder import HFCheckpoint
from mtp_lightning.checkpoint.huggingface.tensor_plan import Plan
from mtp_lightning.errors import CheckpointError
from mtp_lightning.model.mtp_model import initialise_parameter
from mtp_lightning.model.transformers_architecture import architecture_of
from mtp_lightning.model.transformers_library import library
from mtp_lightning.recipe.schema.model import ModelSection
from mtp_lightning.recipe.schema.root import Recipe


@final
@dataclass(frozen=True)
class IncomingWeights:
    """Parameters of a recipe's model, made of a folder's tensors as a plan says."""

    hf_checkpoint: HFCheckpoint
    plan: Plan
    recipe: Recipe
    made: Mapping[str, Tensor] = field(default_factory=dict)  # parameters that were computed from the others

    @property
    def names(self) -> tuple[str, ...]:
        """Every parameter."""
        return tuple(self.plan.parameters)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return self.plan.parameters[name].shape

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Read or make a parameter's values in consecutive blocks.

        Raises:
            CheckpointError: after the last, if one of the values is not a finite number.
        """
        num_odd = 0
        for start, values in self._blocks(name):
            num_odd += values.numel() - int(torch.isfinite(values).sum())
            yield start, values
        if num_odd and (source := self.plan.origins[name].source):
            raise CheckpointError(
                "every weight must be a finite number",
                f"{num_odd:,} NaN or infinite of the {math.prod(self.shape(name)):,} values that {name} takes from "
                f"{source.stored}, in {self.hf_checkpoint.files[source.stored]}",
                "Download the file again; if they are in the release itself, its training has failed: take another",
            )

    def _blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        source = self.plan.origins[name].source
        if name in self.made:
            yield 0, self.made[name].flatten()
        elif source is None:
            made = torch.empty(self.shape(name))
            initialise_parameter(name, made, self.recipe)
            yield 0, made.flatten()
        elif source.layout is PLAIN:
            yield from self.hf_checkpoint.blocks(source.stored)
        else:
            parts = source.layout.split(self.hf_checkpoint.read(source.stored), self.hf_checkpoint.section)
            yield 0, parts[source.part].flatten().contiguous()

    @property
    def dtype(self) -> torch.dtype:
        """Type of all parameters: that of the stored ones, or fp32, which holds the others (fp64 rounded)."""
        types = {self.hf_checkpoint.entries[stored].dtype for stored in self.plan.used} or {torch.float32}
        return types.pop() if len(types) == 1 and torch.float64 not in types else torch.float32


class _Stored(NamedTuple):
    """A tensor of the other side, and the parameters that are its parts."""

    layout: TensorLayout
    parts: dict[int, str]


@final
class OutgoingWeights:
    """Tensors of others, made of the parameters of a checkpoint."""

    def __init__(self, reader: MergedReader, sources: Mapping[str, TensorSource], section: ModelSection) -> None:
        """Gather the parts; `sources` says where each parameter goes."""
        self.reader, self._section = reader, section
        self._stored: dict[str, _Stored] = {}
        for name, source in sources.items():
            self._stored.setdefault(source.stored, _Stored(source.layout, {})).parts[source.part] = name

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor of the other side."""
        return tuple(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        layout, parts = self._stored[name]
        return layout.stored_shape(self.reader.shape(parts[0]))

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Read or put together a tensor's values in consecutive blocks."""
        layout, parts = self._stored[name]
        if layout is PLAIN:
            yield from self.reader.blocks(parts[0])
        else:
            whole = [self.reader.read(parts[n]).view(self.reader.shape(parts[n])) for n in range(layout.num_parts)]
            yield 0, layout.join(whole, self._section).flatten().contiguous()


def outgoing_weights(
    reader: MergedReader, sources: Mapping[str, TensorSource], section: ModelSection
) -> "OutgoingWeights | ConvertedWeights":
    """Tensors of others, in the form that the family of a model stores them."""
    weights = OutgoingWeights(reader, sources, section)
    return ConvertedWeights(weights, section) if section.is_foreign else weights


def account_of(
    weights: "OutgoingWeights | ConvertedWeights", sources: Mapping[str, TensorSource]
) -> tuple[dict[str, str], dict[str, str]]:
    """Say in which tensor each parameter is, and of what further tensors are made, where one is saved as several."""
    saved = weights.saved_as if isinstance(weights, ConvertedWeights) else {}
    tensors = {name: saved.get(one.stored, [one.stored]) for name, one in sources.items()}
    made = {other: f"made of {name}" for name, several in tensors.items() for other in several[1:]}
    return {name: several[0] for name, several in tensors.items()}, made


@final
class ConvertedWeights:
    """Tensors as transformers saves them, made of the parameters of its classes; the last groups are kept at hand.

    They are two because tensors are written by their names, in which those of the two matrices of a layer's experts
    alternate.
    """

    NUM_AT_HAND = 2

    def __init__(self, weights: OutgoingWeights, section: ModelSection) -> None:
        self._weights = weights
        forms = {name: (torch.float32, weights.shape(name)) for name in weights.names}
        groups = outgoing(library(), architecture_of(section).model, forms)
        self._group_of = {name: group for group in groups for name in group.forms}
        self._at_hand: dict[int, dict[str, Tensor]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor of the other side, those that are made together one after the other."""
        return tuple(self._group_of)

    @property
    def saved_as(self) -> dict[str, list[str]]:
        """Tensors that each tensor of the classes is saved as."""
        return {source: [*group.forms] for group in self._group_of.values() for source in group.sources}

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self._group_of[name].forms[name][1]

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Read or make a tensor's values in consecutive blocks."""
        group = self._group_of[name]
        if group.convert is None:
            yield from self._weights.blocks(group.sources[0])
            return
        yield 0, self._made(group)[name].flatten().contiguous()

    def _made(self, group: Conversion) -> dict[str, Tensor]:
        if id(group) not in self._at_hand:
            if len(self._at_hand) == self.NUM_AT_HAND:
                del self._at_hand[next(iter(self._at_hand))]
            self._at_hand[id(group)] = group.make(self._read)
        return self._at_hand[id(group)]

    def _read(self, name: str) -> Tensor:
        return torch.cat([values for _, values in self._weights.blocks(name)]).view(self._weights.shape(name))
