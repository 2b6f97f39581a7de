"""What every head kind has in common: who reads whom, and how one offset is computed."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from mtp_lightning.model.layers import Geometry, layers_of
from mtp_lightning.recipe.head_tree import TRUNK, detaches_input, norm_before, parent_offset
from mtp_lightning.recipe.schema.model import HeadsSection, ModelSection


class HeadContext(NamedTuple):
    """What a head may look at besides the state that it reads."""

    geometry: Geometry
    embedded: Tensor  # (B, T+n, D) embedded tokens
    drafted: Tensor | None = None  # (B, T, D) embedded tokens of which drafts take the place

    def tokens_between(self, offset: int) -> Tensor:
        """Embedding of the token just before the one this offset predicts, t+k-1 at slot t: (B, T, D)."""
        if self.drafted is not None:
            return self.drafted
        num_positions = self.geometry.num_positions
        return self.embedded[:, offset - 1 : offset - 1 + num_positions]


class Heads(nn.Module, ABC):
    """Yields the hidden state of every offset, one at a time and in any order that respects `parent_of`.

    Each offset reads exactly one state: the trunk's output (`TRUNK`) or another offset's. That tree is all
    that backward orders, decoders and checks need to know of a head kind.
    """

    reads_tokens: ClassVar[bool] = False

    def __init__(self, heads: HeadsSection) -> None:
        super().__init__()
        self.section = heads
        self.num_offsets = heads.num_offsets
        self.detaches_trunk = heads.detach_trunk

    @classmethod
    def parent(cls, heads: HeadsSection, offset: int) -> int:
        """Return the offset whose state an offset reads, or `TRUNK`; asked of registered kinds only."""
        return TRUNK

    @classmethod
    def num_layers(cls, heads: HeadsSection, offset: int) -> int:
        """Count the transformer layers that compute an offset; asked of registered kinds only."""
        return 0

    @classmethod
    def weights_beside_layers(cls, model: ModelSection, heads: HeadsSection, offset: int) -> tuple[int, int]:
        """Count the entries of matrices and of vectors of an offset outside of transformer layers, by building it.

        A module that several offsets share counts for the first of them.
        """
        with torch.device("meta"):
            built = cast(Callable[..., Heads], cls)(model, heads, recompute=False)
        before = [module for other in range(1, offset) for module in built.modules_of(other)]
        layers = layers_of(built)
        counted = {id(p) for module in (*before, *layers) for p in module.parameters()}
        own = {id(p): p for module in built.modules_of(offset) for p in module.parameters()}
        sizes = [(p.dim(), p.numel()) for key, p in own.items() if key not in counted]
        return sum(size for dim, size in sizes if dim > 1), sum(size for dim, size in sizes if dim < 2)

    def parent_of(self, offset: int) -> int:
        """Name the offset whose state this one reads, or `TRUNK` (or a mixture of the trunk's layers in its place)."""
        return parent_offset(self.section, offset)

    @abstractmethod
    def forward(self, offset: int, state: Tensor, context: HeadContext) -> Tensor:
        """Compute the hidden state of an offset from the state that it reads: (B, T, D) -> (B, T, D).

        The state comes normed where `reads_norm_of` says so, which is the caller's business.
        """

    @abstractmethod
    def modules_of(self, offset: int) -> Sequence[nn.Module]:
        """List the modules whose parameters compute this offset."""

    def reads_norm_of(self, offset: int) -> int | None:
        """Name the offset whose final norm the state passes before this one reads it; None for none."""
        return norm_before(self.section, offset)

    def first_map(self, offset: int) -> tuple[nn.Linear, int] | None:
        """Name the linear map that an offset begins with and how many layers follow it, or None: see `fit_heads`."""
        return None

    def norm_index(self, offset: int) -> int | None:
        """Number of the final norm that this offset's state passes before the unembedding; None for no norm."""
        return 0

    @property
    def offsets(self) -> range:
        """All offsets, 1 to n."""
        return range(1, self.num_offsets + 1)

    @property
    def order(self) -> list[int]:
        """All offsets in an order in which each comes after the one it reads."""
        ordered: list[int] = []
        frontier = [TRUNK]
        while frontier:
            read = self.dependents(frontier.pop(0))
            ordered += read
            frontier += read
        return ordered

    def dependents(self, offset: int) -> list[int]:
        """Offsets that read the state of this one."""
        return [reader for reader in self.offsets if self.parent_of(reader) == offset]

    def chain(self, offset: int) -> list[int]:
        """Offsets that are computed one after the other on the way from the trunk to this one, which is the last."""
        path = [offset]
        while (source := self.parent_of(path[0])) != TRUNK:
            path.insert(0, source)
        return path

    def descendants(self, offset: int) -> set[int]:
        """This offset and all whose states depend on it."""
        return {offset}.union(*(self.descendants(reader) for reader in self.dependents(offset)))

    def detaches_input(self, offset: int) -> bool:
        """Tell whether this offset's gradients stop before the state that it reads (`heads.detach_trunk`)."""
        return detaches_input(self.section, offset, self.parent_of(offset))
