"""A decoder of transformers as the trunk, its own modules and attention untouched, and heads of its own type of layer.

A decoder's forward prepares what its layers are called with: masks, rotary tables, positions, for each layer of its
kind. So that no architecture need be known by its name, that forward is run with stand-ins in place of the layers, that
keep what they are given (`probe`); layers of trunk and heads are then called with it, one after the other.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from mtp_lightning.errors import CheckpointError
from mtp_lightning.model.positions import KVCache
from mtp_lightning.model.recompute import recomputed
from mtp_lightning.model.scalar_mix import Sums
from mtp_lightning.model.transformers_architecture import Architecture, architecture_of
from mtp_lightning.model.transformers_constants import restore_constants, unset_like
from mtp_lightning.model.transformers_names import refused
from mtp_lightning.model.transformers_past import PAST, LayerPast, PastLength
from mtp_lightning.model.transformers_probe import probe
from mtp_lightning.model.transformers_routers import router_loss_of
from mtp_lightning.recipe.schema.model import ModelSection

DRAWING = {"PhimoeTopKRouter"}  # experts, by their scores


@dataclass(frozen=True)
class LayerInputs:
    """What layers are called with beside their state, for a batch of windows; the counterpart of `AttentionInputs`.

    Attributes:
        positions: (B, T) place of each position in its document.
        calls: for each layer of the architecture what it is called with, by name.
        output: how a layer returns its state; see `Architecture`.
        past: keys and values of earlier positions, for layers to go on from, or None.
    """

    positions: Tensor
    calls: list[dict[str, Any]]
    output: int
    past: KVCache | None = None

    @property
    def num_positions(self) -> int:
        """Length T of the windows."""
        return self.positions.shape[1]

    def with_past(self, past: KVCache) -> Self:
        """Let layers go on from keys and values of earlier positions."""
        return replace(self, past=past)

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Run a layer: (B, T, D) -> (B, T, D)."""
        call = self.calls[layer.like_layer]  # type: ignore[index]
        if self.past is not None:
            past = LayerPast(self.past, layer)
            call = {**call, **{name: past for name in PAST if isinstance(call.get(name), PastLength)}}
        output = layer(hidden, **call)
        state: Tensor = output[0] if self.output else output
        return state


def computes_without_gradient(kind: type[nn.Module]) -> bool:
    """Say whether the forward of a class is under `torch.no_grad`, as that of what chooses keys for sparse attention.

    >>> computes_without_gradient(nn.Linear)
    False
    """
    forward: Any = kind.forward
    while hasattr(forward, "__wrapped__"):  # by functools.wraps, here and in the decorator of torch 2.13
        held = (getattr(cell.cell_contents, "__self__", None) for cell in forward.__closure__ or ())
        if any(isinstance(one, torch.no_grad | torch.inference_mode) for one in held):
            return True
        forward = forward.__wrapped__
    return False


class ForeignModules(nn.Module):
    """Modules of transformers, whose constants stay right whatever becomes of the model.

    Buffers that are not saved (rotary frequencies, scales) keep their values and types when the model is moved, cast or
    given memory. Those that are saved become parameters that are never trained, as are parameters that the class itself
    takes no gradient of, or computes with under `torch.no_grad`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._constants: dict[str, Tensor] = {}
        self.untrained: set[str] = set()

    def keep_constants(self, architecture: Architecture) -> None:
        """Compute all buffers of the children and keep them; call it once, when everything is built."""
        saved = self.state_dict(keep_vars=True).keys()
        self.untrained.update(name for name, one in self.named_parameters() if not one.requires_grad)
        for module_name, module in self.named_modules():
            if computes_without_gradient(type(module)):
                self.untrained.update(f"{module_name}.{name}" for name, _ in module.named_parameters())
            for name, buffer in list(module.named_buffers(recurse=False)):
                if (full := f"{module_name}.{name}") in saved:
                    delattr(module, name)
                    kept = buffer.to(torch.empty(0).dtype) if buffer.is_floating_point() else buffer
                    module.register_parameter(name, nn.Parameter(kept, requires_grad=False))
                    self.untrained.add(full)
                elif buffer.is_meta:
                    module.register_buffer(name, unset_like(buffer), persistent=False)
        if self._has_meta_parameters():
            with torch.no_grad(), torch.device("cpu"):
                restore_constants(architecture.model, self)
                self._set_by_others(architecture)
        self._constants = {name: buffer.cpu() for name, buffer in self.named_buffers()}

    def _set_by_others(self, architecture: Architecture) -> None:
        """Fill the buffers that no rule of their own module has set: the decoder may set those of its layers."""
        for full, buffer in self.named_buffers():
            if buffer.is_floating_point() and buffer.isnan().any():
                value = architecture.constants.get(full.removeprefix("decoder."))
                if value is None or value.isnan().any():
                    raise refused(architecture.name, f"a buffer {full} that no rule of its class sets")
                buffer.copy_(value)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules, but of those that would draw in training whatever their settings say."""
        super().train(mode)
        for module in self.modules():
            if type(module).__name__ in DRAWING:
                module.training = False
        return self

    def _has_meta_parameters(self) -> bool:
        return any(parameter.is_meta for parameter in self.parameters())

    def _apply(self, fn: Callable[[Tensor], Tensor], *options: Any) -> Self:
        super()._apply(fn, *options)  # type: ignore[no-untyped-call]
        for full, value in self._constants.items():
            owner, _, name = full.rpartition(".")
            module = self.get_submodule(owner)
            buffer = module._buffers[name]
            assert buffer is not None
            module._buffers[name] = value.to(buffer.device)
        return self


def walk(
    layers: nn.ModuleList, hidden: Tensor, inputs: LayerInputs, *, recompute: bool, on_host: bool
) -> Iterator[Tensor]:
    """Run every layer on the output of the one before, (B, T, D), and yield the output of each."""
    for layer in layers:
        if recompute and torch.is_grad_enabled():
            hidden = recomputed(inputs.run, layer, hidden, on_host=on_host)
        else:
            hidden = inputs.run(layer, hidden)
        yield hidden


class ForeignStack(ForeignModules, nn.ModuleList):
    """Layers of a head, like the last ones of the architecture, run one after the other."""

    on_host: bool = False

    def __init__(self, section: ModelSection, num_layers: int, *, recompute: bool) -> None:
        super().__init__()
        architecture = architecture_of(section)
        self.recompute = recompute
        num_all = len(architecture.layers)
        for place in range(num_layers):
            index = max(num_all - num_layers + place, 0)
            layer = architecture.build_layer(index)
            layer.like_layer = index  # type: ignore[assignment]
            self.append(layer)
        self.keep_constants(architecture)

    def forward(self, hidden: Tensor, inputs: LayerInputs) -> Tensor:
        """Run every layer: (B, T, D) -> (B, T, D)."""
        for output in walk(self, hidden, inputs, recompute=self.recompute, on_host=self.on_host):
            hidden = output
        return hidden


class TransformersTrunk(ForeignModules):
    """Token embedding and layers of a decoder of transformers; the final norm belongs to the unembedding."""

    on_host: bool = False

    def __init__(self, section: ModelSection, num_layers: int, *, recompute: bool) -> None:
        super().__init__()
        self.architecture = architecture_of(section)
        self.recompute = recompute
        self.decoder = self.architecture.build_decoder(num_layers)
        for number, layer in enumerate(self.layers):
            layer.like_layer = number  # type: ignore[assignment]
        self.keep_constants(self.architecture)
        for name in self.architecture.unread:
            self.untrained.add(f"decoder.{name}")
            self.decoder.get_parameter(name).requires_grad_(False)
        self.router_loss = router_loss_of(self.architecture, self.layers)

    @property
    def embed_tokens(self) -> nn.Embedding:
        """The model's own input embedding."""
        return cast(nn.Embedding, self.decoder.get_submodule(self.architecture.names.embedding))

    @property
    def layers(self) -> nn.ModuleList:
        """The layers."""
        return cast(nn.ModuleList, self.decoder.get_submodule(self.architecture.names.layers))

    @torch.no_grad()
    def inputs(
        self, embedded: Tensor, positions: Tensor, documents: Tensor | None = None, **further: Any
    ) -> LayerInputs:
        """Prepare what layers of trunk and heads are called with.

        Args:
            embedded: (B, T, D) embedded tokens; what counts is their shape, type and device.
            positions: (B, T) place of each in its document.
            documents: (B, T) number of the document of each, to attend to no other; None attends to all of the past.
            further: more for the decoder's own forward, such as `attention_mask`.
        """
        _, calls = self._probe(
            torch.zeros_like(embedded), positions, **further
        )  # some scale what they are given in place
        if documents is not None:
            self._keep_inside(calls, documents)
        return LayerInputs(positions, calls, self.architecture.output)

    def forward(self, embedded: Tensor, inputs: LayerInputs, *, sums: Sums | None = None) -> tuple[Tensor, ...]:
        """Run the layers on embedded tokens: (B, T, D) -> the last state, then those of `sums`, (B, T, D) each."""
        scale = self.architecture.embedding_scale
        hidden = embedded if scale == 1.0 else embedded * scale
        if not self.architecture.reads_embedding:  # scaled, or with positions added
            hidden, _ = self._probe(hidden.clone(), inputs.positions)
        with nullcontext() if self.router_loss is None else self.router_loss.gathering():
            for number, output in enumerate(
                walk(self.layers, hidden, inputs, recompute=self.recompute, on_host=self.on_host)
            ):
                hidden = output
                if sums is not None:
                    sums.add(number, hidden)
        if self.router_loss is not None:
            hidden = self.router_loss.added_to(hidden)
        return (hidden, *(sums.states.values() if sums is not None else ()))

    def _probe(self, embedded: Tensor, positions: Tensor, **further: Any) -> tuple[Tensor, list[dict[str, Any]]]:
        architecture = self.architecture
        layers = {architecture.names.layers: architecture.layers}
        return probe(self.decoder, layers, embedded, positions, output=architecture.output, **further)

    def _keep_inside(self, calls: list[dict[str, Any]], documents: Tensor) -> None:
        """Take from masks what lies in other documents, for decoders that do not see it from positions."""
        architecture = self.architecture
        same = (documents[:, :, None] == documents[:, None, :])[:, None]  # (B, 1, T, T)
        causal = torch.tril(torch.ones_like(same)) if architecture.lacks_masks else None
        done: dict[int, Tensor] = {}
        for call in calls:
            mask = call.get("attention_mask")
            mask = causal if mask is None else mask
            if isinstance(mask, Tensor) and mask.dim() == 4:
                if id(mask) not in done:
                    hidden = torch.finfo(mask.dtype).min if mask.is_floating_point() else architecture.hides_by_true
                    done[id(mask)] = torch.where(same, mask, hidden)
                call["attention_mask"] = done[id(mask)]


def check_masks(section: ModelSection) -> None:
    """Check that layers can be kept from attending to other documents.

    Raises:
        CheckpointError: Some carry a state from position to position, or take no mask.
    """
    architecture = architecture_of(section)
    if not architecture.masks_documents:
        raise CheckpointError(
            "data.document_mask must be false for a model whose layers do not all take a mask",
            f"true; {architecture.name} has layers that carry a state from one position to the next",
            "Set data.document_mask=false: documents of a window then see those before them",
        )
