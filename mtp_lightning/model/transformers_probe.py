"""What layers of a decoder of transformers are called with: its own forward is run with stand-ins in their place."""

import copy
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn


class Probe(nn.Module):
    """Stands in the place of a layer and keeps what it is called with; `map` says what it returns of its input."""

    def __init__(self, layer: nn.Module, number: int, output: int, calls: list[dict[str, Any]]) -> None:
        super().__init__()
        layer = getattr(layer, "_stands_for", layer)
        object.__setattr__(self, "_stands_for", layer)  # no child: nothing here owns its weights
        self.number, self.output, self.calls = number, output, calls

    def __getattr__(self, name: str) -> Any:
        """Have what the layer has: some decoders ask a layer for its kind."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_stands_for"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the call; return the state as it is."""
        names = parameter_names(type(object.__getattribute__(self, "_stands_for")).forward)
        call = {**dict(zip(names, args, strict=False)), **kwargs}
        hidden = call.pop(names[0])
        self.calls.append(call | {"": hidden})
        changed = self.change(hidden, call)
        return changed if self.output == 0 else (changed, *[None] * (self.output - 1))

    def change(self, hidden: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Return the state that goes on to the next layer."""
        return hidden


class TrialLayer(Probe):
    """A layer without weights that depends on its number and on everything that it is given."""

    def change(self, hidden: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Return the state that goes on to the next layer."""
        given = sum(
            (torch.nan_to_num(value).clamp(-1, 1).mean() for value in floats(call.values())), start=torch.zeros(())
        )
        return hidden + 0.1 * (self.number + 1) * torch.tanh(hidden) + 0.01 * given


def floats(values: Any) -> Iterator[Tensor]:
    """Find the tensors of floating-point numbers among values, in lists and tuples, too."""
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            yield value
        elif isinstance(value, tuple | list):
            yield from floats(value)


@functools.cache
def parameter_names(forward: Hashable) -> tuple[str, ...]:
    """Names of what a layer's forward takes, in order, the state first."""
    return tuple(inspect.signature(cast(Callable[..., Any], forward)).parameters)[1:]


def probe(
    decoder: nn.Module,
    layers: Mapping[str, nn.ModuleList],
    embedded: Tensor,
    positions: Tensor,
    *,
    output: int,
    **further: Any,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Run a decoder's own forward without its layers.

    Args:
        decoder: the decoder; it is left as it is.
        layers: its list of layers, all of the architecture's, by its name in the decoder; they are only asked for
            their kinds.
        embedded: (B, T, D) embedded tokens.
        positions: (B, T) places of the tokens in their documents.
        output: how a layer returns its state; see `Architecture`.
        further: more for its forward, such as a mask of one's own.

    Returns:
        What the first layer reads, (B, T, D), and what each layer is called with beside its state, by the names of its
        forward's parameters.
    """
    calls: list[dict[str, Any]] = []
    view = copy.copy(decoder)
    (name, real), *_ = layers.items()
    stand_ins = nn.ModuleList(Probe(layer, number, output, calls) for number, layer in enumerate(real))
    view._modules = {**decoder._modules, name: stand_ins}
    names = inspect.signature(type(decoder).forward).parameters
    options = {"position_ids": positions, "use_cache": False, "return_dict": True, **further}
    view.forward(inputs_embeds=embedded, **{key: value for key, value in options.items() if key in names})
    states = [call.pop("") for call in calls]
    return states[0], calls
