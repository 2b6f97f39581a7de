"""Heads that are what they began as: an export of them is warned about."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mtp_lightning.checkpoint.convert.consolidate import REPORT_NAME
from mtp_lightning.checkpoint.export.contents import Source
from mtp_lightning.checkpoint.format.folder import CheckpointFolder, open_checkpoint
from mtp_lightning.errors import MtpError
from mtp_lightning.files.paths import expanded
from mtp_lightning.files.untrusted import OddFileError, read_object
from mtp_lightning.model.mtp_model import initialise_parameter

AS_IT_CAME = "loaded"
"""What the report of an import says of a tensor that its folder held: somebody else has trained it."""


def untrained_heads(source: Source) -> list[str]:
    """Name the heads beyond the main one of which every tensor is as it began: drawn, copied or fitted.

    Memory: the largest tensor of such a head.
    """
    heads: dict[str, list[str]] = {}
    for name, parameter in source.parameters.items():
        if parameter.owner.startswith("offset ") and parameter.owner != "offset 1":
            heads.setdefault(parameter.owner, []).append(name)
    begin = _Beginning(source)
    by_size = {owner: sorted(names, key=lambda name: source.reader.numel(name)) for owner, names in heads.items()}
    return [owner for owner, names in by_size.items() if all(begin.is_same(name) for name in names)]


class _Beginning:
    """What a run began with."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._origin = origin_of(source)
        self._how = _how(self._origin.path) if self._origin else {}

    def is_same(self, name: str) -> bool:
        """Tell whether a parameter is as it began, and was not trained before."""
        if self._how.get(name) == AS_IT_CAME or (self._origin and self._origin.step > 0):
            return False
        if self._origin is not None and self._origin.path == self._source.checkpoint.path:
            return True
        expected = iter(self._blocks(name))
        return all(torch.equal(values, next(expected)) for _, values in self._source.reader.blocks(name))

    def _blocks(self, name: str) -> Iterator[Tensor]:
        reader = self._source.reader
        if self._origin is not None and name in self._origin.reader.names:
            for (_, values), (_, now) in zip(self._origin.reader.blocks(name), reader.blocks(name), strict=False):
                yield values.to(now.dtype) if values.shape == now.shape else torch.empty(0)
            return
        drawn = torch.empty(reader.shape(name))
        initialise_parameter(name, drawn, self._source.recipe)
        for start, values in reader.blocks(name):
            yield drawn.view(-1)[start : start + values.numel()].to(values.dtype)


def origin_of(source: Source) -> CheckpointFolder | None:
    """Open what the weights came from: an imported folder, or the one that the run started from, if it is there."""
    if source.checkpoint.is_export and (source.checkpoint.path / REPORT_NAME).is_file():
        return source.checkpoint
    path = source.recipe.init.path
    try:
        return open_checkpoint(Path(expanded(path)), verify=False) if path else None
    except (MtpError, OSError):  # it is gone
        return None


def _how(folder: Path) -> dict[str, str]:
    """Read from the report of an import what each parameter began as; {} where there is none."""
    try:
        told = read_object(folder / REPORT_NAME).get("parameters")
    except (OSError, OddFileError):
        return {}
    return {name: one.get("how", "") for name, one in told.items()} if isinstance(told, dict) else {}
