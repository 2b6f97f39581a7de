"""A checkpoint seen otherwise: under other names, with parameters that it lacks, or without its optimizer."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol, final

from torch import Tensor

from mtp_lightning.checkpoint.format.read_shards import ShardReader
from mtp_lightning.checkpoint.format.write_shards import WEIGHT


class WeightSource(Protocol):
    """Named weights that can be read block by block."""

    @property
    def names(self) -> Iterable[str]:
        """Every parameter."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield a parameter's values in consecutive blocks, each with the number of its first value."""


@final
class RenamingReader:
    """A reader whose parameters have other names, one stored parameter under several if need be.

    Attributes:
        names: every parameter by its new name.
    """

    def __init__(
        self,
        reader: ShardReader,
        origins: Mapping[str, str] | None = None,
        *,
        has_moments: bool = False,
        fresh: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        """Look at a reader.

        Args:
            reader: what is stored.
            origins: for every new name the stored one; None keeps all names.
            has_moments: show the optimizer's state as well.
            fresh: shapes of parameters that are not stored, and of which there is nothing to read.
        """
        self._reader, self._has_moments = reader, has_moments
        self._origins = {name: name for name in reader.names} if origins is None else origins
        self._fresh = fresh or {}
        self.names = (*self._origins, *self._fresh)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self._fresh[name] if name in self._fresh else self._reader.shape(self._origins[name])

    def shape_of(self, name: str, kind: str) -> tuple[int, ...]:
        """Shape of the weight or of a moment, that of the whole parameter, or of a factor of a moment, its own."""
        return self.shape(name) if name in self._fresh else self._reader.shape_of(self._origins[name], kind)

    def kinds(self, name: str) -> tuple[str, ...]:
        """What can be read of a parameter: `weight`, and the names of its moments."""
        if name in self._fresh:
            return ()
        return self._reader.kinds(self._origins[name]) if self._has_moments else (WEIGHT,)

    def step(self, name: str) -> float | None:
        """Step count that the optimizer keeps of a parameter; None where it keeps none."""
        is_kept = self._has_moments and name not in self._fresh
        return self._reader.step(self._origins[name]) if is_kept else None

    def read(self, name: str, kind: str = WEIGHT, start: int = 0, stop: int | None = None) -> Tensor:
        """Read an interval of a flattened parameter or moment: (stop - start,) in CPU memory, as stored."""
        return self._reader.read(self._origins[name], kind, start, stop)

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Read a parameter's values in consecutive blocks."""
        return self._reader.blocks(self._origins[name])


Reader = ShardReader | RenamingReader
"""Where a strategy takes weights and moments from."""
