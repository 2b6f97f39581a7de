"""Modules for further tokens beside a decoder of transformers' own classes, which leaves them unread.

A module's layer is of the class of the decoder's last one, and its tensors are converted as those of that layer are.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from mtp_lightning.checkpoint.format.tensors import Entry
from mtp_lightning.checkpoint.huggingface.canonical_names import MODULE, PLAIN, TensorSource
from mtp_lightning.checkpoint.huggingface.conversions import Conversion, incoming
from mtp_lightning.checkpoint.huggingface.modules import LAYOUTS, ModuleLayout, Native
from mtp_lightning.model.transformers_architecture import Architecture
from mtp_lightning.model.transformers_library import library

FIRST = "layers.0."


class Beside(NamedTuple):
    """Modules among the tensors of a folder."""

    layout: ModuleLayout
    prefixes: list[str]  # of every module, in order
    names: list[str]  # of all their tensors

    def block(self, number: int) -> str:
        """Beginning of the names of a module's layer."""
        return self.prefixes[number] + self.layout.names.get(FIRST, FIRST)

    def own(self, number: int, place: str) -> str | None:
        """Name of what a module has beside its layer."""
        for beginning, called in self.layout.names.items():
            if place.startswith(beginning) and not beginning.startswith("layers."):
                return self.prefixes[number] + called + place.removeprefix(beginning)
        return None


def modules_beside(stored: Mapping[str, Entry]) -> Beside | None:
    """Find modules by the names of a folder's tensors; None where there are none."""
    for layout in LAYOUTS:
        markers = [name for name in stored if re.fullmatch(layout.marker, name)]
        if markers:
            numbered = sorted(markers, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
            prefixes = [name.removesuffix(f"{layout.names['eh_proj.']}weight") for name in numbered]
            return Beside(layout, prefixes, [name for name in stored if name.startswith(tuple(prefixes))])
    return None


def read_modules(
    beside: Beside, architecture: Architecture, stored: Mapping[str, Entry]
) -> tuple[Native, list[Conversion]]:
    """Say how the tensors of modules become parameters of heads.

    Returns:
        The heads, and what makes those of their tensors that no file holds as they are.

    Raises:
        ValueError, RuntimeError: they do not fit together as transformers' table wants them.
    """
    names = architecture.names
    like = f"{names.decoder}.{names.layers}.{len(architecture.layers) - 1}."
    layout = beside.layout
    plain: dict[str, str] = {}  # what a tensor that is read as it is would be called, and what it is called
    conversions: list[Conversion] = []
    copies = {f"{prefix}{name}": place for prefix in beside.prefixes for name, place in layout.copies.items()}
    for number in range(len(beside.prefixes)):
        block = beside.block(number)
        apart = {*copies, *(one for one in beside.names if _is_apart(beside, number, one))}
        inside = {like + one.removeprefix(block): one for one in beside.names if one.startswith(block)}
        inside = {renamed: one for renamed, one in inside.items() if one not in apart}
        forms = {renamed: (stored[one].dtype, stored[one].shape) for renamed, one in inside.items()}
        for one in incoming(library(), architecture.model, forms)[0]:
            sources = tuple(inside[source] for source in one.sources)
            if one.convert is None:
                plain |= {block + name.removeprefix(like): sources[0] for name in one.forms}
            else:
                conversions.append(_moved(one, sources, {name: block + name.removeprefix(like) for name in one.forms}))

    def source(place: str) -> TensorSource | None:
        match = MODULE.fullmatch(place)
        if match is None or int(match[1]) >= len(beside.prefixes):
            return None
        number, rest = int(match[1]), match[2]
        name = beside.block(number) + rest.removeprefix(FIRST) if rest.startswith(FIRST) else beside.own(number, rest)
        return None if name is None else TensorSource(plain.get(name, name), PLAIN)

    native = Native(layout.name, len(beside.prefixes), layout.heads, source, copies, ignored=frozenset(beside.names))
    return native, conversions


def _is_apart(beside: Beside, number: int, name: str) -> bool:
    """Tell whether a tensor lies in a module beside its layer."""
    prefix = beside.prefixes[number]
    apart = tuple(prefix + one for beginning, one in beside.layout.names.items() if not beginning.startswith("layers."))
    return name.startswith(apart)


def _moved(one: Conversion, sources: tuple[str, ...], targets: Mapping[str, str]) -> Conversion:
    """Let a conversion read and make tensors under other names."""
    names, convert = dict(zip(sources, one.sources, strict=True)), one.convert
    assert convert is not None

    def moved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        made = convert({names[source]: value for source, value in tensors.items()})
        return {targets[name]: value for name, value in made.items()}

    return Conversion(sources, {targets[name]: form for name, form in one.forms.items()}, moved)
