"""A checkpoint with low-rank updates, seen as the plain model that it computes: every update added to its weight."""

from collections.abc import Iterable, Iterator
from typing import final

import torch
from torch import Tensor

from mtp_lightning.checkpoint.format.read_shards import ShardReader
from mtp_lightning.checkpoint.format.write_shards import WEIGHT
from mtp_lightning.model.lora import DOWN, UP, merged
from mtp_lightning.model.roles import LORA, role_of
from mtp_lightning.recipe.schema.root import Recipe


def plain_recipe(recipe: Recipe) -> Recipe:
    """Describe the model in which all low-rank updates are merged; nothing of it is frozen."""
    if recipe.adapt.lora is None:
        return recipe
    below = [part for part in recipe.freeze if part not in recipe.frozen_parts]
    return recipe.model_copy(update={"adapt": recipe.adapt.model_copy(update={"lora": None}), "freeze": below})


@final
class MergedReader:
    """Weights of a checkpoint under the names of the plain model; without updates they are as stored.

    Memory: the two small matrices of an update and one block of the weight that it belongs to.
    """

    def __init__(self, reader: ShardReader, recipe: Recipe) -> None:
        self._reader, self._lora = reader, recipe.adapt.lora
        self.folder = reader.folder

    @property
    def names(self) -> tuple[str, ...]:
        """Every parameter of the plain model."""
        return tuple(name for name in self._reader.names if self._lora is None or role_of(name) != LORA)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self._reader.shape(name)

    def numel(self, name: str) -> int:
        """Number of values of the whole parameter."""
        return self._reader.numel(name)

    def read(self, name: str) -> Tensor:
        """Read a parameter whole and flattened, in CPU memory."""
        return torch.cat([values for _, values in self.blocks(name)])

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Read a parameter's values in consecutive blocks, each with the number of its first value."""
        stem, _, kind = name.rpartition(".")
        if self._lora is None or kind != WEIGHT or stem + UP not in self._reader.names:
            yield from self._reader.blocks(name)
            return
        down, up = (self._reader.read(half).view(self._reader.shape(half)) for half in (stem + DOWN, stem + UP))
        yield from updated_blocks(self._reader.blocks(name), down, up, self._lora.alpha / self._lora.rank)


def updated_blocks(
    blocks: Iterable[tuple[int, Tensor]], down: Tensor, up: Tensor, scale: float
) -> Iterator[tuple[int, Tensor]]:
    """Add scale x B A to a matrix (E, D) that comes in flat blocks, each with the number of its first value.

    Args:
        blocks: of the matrix.
        down: A (R, D).
        up: B (E, R).
        scale: what the product is multiplied by.
    """
    width = down.shape[1]
    for start, values in blocks:
        first, last = start // width, -(-(start + len(values)) // width)  # rows that the block lies in
        rows = values.new_zeros((last - first) * width)
        inside = slice(start - first * width, start - first * width + len(values))
        rows[inside] = values
        yield start, merged(rows.view(-1, width), down, up[first:last], scale).flatten()[inside]
