"""Which stored tensors make which parameters of a class of transformers, and back: by transformers' own table.

A folder holds, say, one matrix for each expert, and the class one for all of them. transformers renames and converts
when it loads and the other way when it saves; the same transforms are applied here, to one group of tensors at a time.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

Form = tuple[torch.dtype, tuple[int, ...]]


class Conversion(NamedTuple):
    """Tensors that are made together, of others."""

    sources: tuple[str, ...]
    forms: dict[str, Form]  # of what is made, by name
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None  # None: the one source, under another name

    def make(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Make the tensors of this group; memory: the group about three times."""
        if self.convert is None:
            return {name: read(self.sources[0]) for name in self.forms}
        return self.convert({name: read(name) for name in self.sources})

    def renamed(self, target: Callable[[str], str], source: Callable[[str], str] = str) -> "Conversion":
        """Make the same under other names, of tensors under other names."""
        told, convert = {source(name): name for name in self.sources}, self.convert
        forms = {target(name): form for name, form in self.forms.items()}
        if convert is None:
            return Conversion((*told,), forms, None)

        def make(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            made = convert({told[name]: one for name, one in tensors.items()})
            return {target(name): one for name, one in made.items()}

        return Conversion((*told,), forms, make)


def incoming(library: Any, model: Any, stored: Mapping[str, Form]) -> tuple[list[Conversion], list[str]]:
    """Say how stored tensors become parameters and buffers of a model on the meta device.

    Returns:
        Conversions, and the names of stored tensors that the model has no place for.

    Raises:
        ValueError, RuntimeError: tensors do not fit together as the table wants them.
    """
    transforms = library.conversion_mapping.get_model_conversion_mapping(model)
    core = library.core_model_loading
    renamings, converters = _sorted(core, transforms)
    inside = model.state_dict()
    groups: dict[str, _Group] = {}
    left: list[str] = []
    for name in sorted(stored, key=core.dot_natural_key):
        renamed, pattern = core.rename_source_key(name, renamings, converters, model.base_model_prefix, inside)
        if renamed not in inside and name in inside:
            renamed, pattern = core.rename_source_key(name, [], [], model.base_model_prefix, inside)
        if renamed not in inside:
            left.append(name)
        else:
            groups.setdefault(renamed, _Group(core, model, renamed, _by_pattern(converters, pattern))).add(
                name, pattern
            )
    for group in groups.values():
        left += group.superfluous()
    return [group.conversion(stored) for group in groups.values()], left


def outgoing(library: Any, model: Any, forms: Mapping[str, Form]) -> list[Conversion]:
    """Say how parameters and buffers of a model become the tensors that transformers would save."""
    core = library.core_model_loading
    table = library.conversion_mapping.get_model_conversion_mapping(model, add_legacy=False)
    kept = [one for one in table if not isinstance(one, core.PrefixChange)]  # as transformers does
    renamings, converters = _sorted(core, [one.reverse_transform() for one in reversed(kept)])
    groups: dict[str, _Group] = {}
    for name in sorted(forms, key=core.dot_natural_key):
        renamed, pattern = core.apply_converters(name, converters)
        if pattern is None:
            renamed = core.apply_renamings(name, renamings)
        group = _Group(core, model, renamed, _by_pattern(converters, pattern), renamings)
        groups.setdefault(renamed, group).add(name, pattern)
    return [group.conversion(forms) for group in groups.values()]


class _Group:
    """Tensors of one side on their way through one transform."""

    def __init__(self, core: Any, model: Any, target: str, transform: Any, renamings: Iterable[Any] = ()) -> None:
        self.core, self.model, self.target = core, model, target
        self.transform, self.renamings = transform, [*renamings]
        self.members: list[tuple[str, str | None]] = []

    def add(self, name: str, pattern: str | None) -> None:
        self.members.append((name, pattern))

    def superfluous(self) -> list[str]:
        """Take out what would be another one under the same name."""
        extra = self.members[1:] if self.transform is None else []
        self.members = self.members[: len(self.members) - len(extra)]
        return [name for name, _ in extra]

    def conversion(self, forms: Mapping[str, Form]) -> Conversion:
        """Find out by tensors without memory what comes out of it."""
        sources = tuple(name for name, _ in self.members)
        if self.transform is None:
            return Conversion(sources, {self.target: forms[sources[0]]}, None)
        empty = {name: torch.empty(forms[name][1], dtype=forms[name][0], device="meta") for name in sources}
        try:
            made = self.convert(empty)
        except Exception as error:
            raise ValueError(f"{len(sources)} tensors that make {self.target}: {error}") from error
        return Conversion(sources, {name: (one.dtype, tuple(one.shape)) for name, one in made.items()}, self.convert)

    def convert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        transform = deepcopy(self.transform)
        for name, pattern in self.members:
            transform.add_tensor(self.target, name, pattern, tensors.pop(name))
        made = transform.convert(self.target, model=self.model, config=self.model.config)
        return {
            self.core.apply_renamings(name, self.renamings): one[0] if isinstance(one, list) else one
            for name, one in made.items()
        }


def _sorted(core: Any, transforms: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    told = [*transforms]
    renamings = [one for one in told if isinstance(one, core.WeightRenaming)]
    return renamings, [one for one in told if isinstance(one, core.WeightConverter)]


def _by_pattern(converters: Iterable[Any], pattern: str | None) -> Any:
    return next((one for one in converters if pattern is not None and pattern in one.source_patterns), None)
