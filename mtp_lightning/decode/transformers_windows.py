"""Windows over a decoder of transformers: what its layers are called with, and which past positions each attends to.

Its own forward prepares the calls (`TransformersTrunk.inputs`). Its masks, though, know neither rows of different
lengths nor trees, so ours take their place. How far a layer looks back is measured on the mask that the decoder makes
for the last two positions of its context.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mtp_lightning.errors import DecodingError, MtpError
from mtp_lightning.model.layers import layers_of
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.model.transformers_library import library
from mtp_lightning.model.transformers_past import ALIBI, GENERATE_ELSEWHERE, MASK, PAST, PastLength
from mtp_lightning.model.transformers_trunk import LayerInputs, TransformersTrunk


@final
@dataclass(frozen=True)
class Span:
    """What a layer attends to, and how its masks say it."""

    window: int | None  # so many positions, its own the last; None for all
    chunk: int | None  # positions of the same chunk of so many; None for all
    shown: float  # value of a mask where it attends; 1 or 0 in one of truth values
    adds: bool  # the mask adds to scores what depends on the key's slot (ALiBi)
    by_slot: bool  # something else does, or the mask
    skips: bool  # no mask at all means plain causal attention

    def sees_all(self, reach: int) -> bool:
        """Whether the last of some positions attends to all of them."""
        return reach <= min(self.window or reach, self.chunk or reach)


_SPANS: WeakKeyDictionary[TransformersTrunk, list[Span | None]] = WeakKeyDictionary()


def spans_of(model: MtpModel) -> list[Span | None]:
    """Say for each layer of the architecture what it attends to; None for one that carries a state.

    Raises:
        DecodingError: A layer attends by a rule that cannot be told from its masks.
    """
    trunk = model.trunk
    if not isinstance(trunk, TransformersTrunk):
        return []
    if trunk not in _SPANS:
        _SPANS[trunk] = _measured(trunk, max(model.section.max_position_embeddings, 3))
    return _SPANS[trunk]


def is_recurrent(model: MtpModel) -> bool:
    """Whether layers carry a state of all the past, which cannot be rolled back, rather than keys and values."""
    return None in spans_of(model)


def check_states(model: MtpModel, path: Collection[int]) -> None:
    """Check that no two layers of trunk and of the offsets on the way to the main head would share a state.

    Raises:
        DecodingError: They would.
    """
    if not is_recurrent(model):
        return
    owners = [model.trunk, *(module for offset in path for module in model.heads.modules_of(offset))]
    indices = [int(layer.like_layer) for owner in owners for layer in layers_of(owner)]  # type: ignore[arg-type]
    stateful = [index for index in indices if spans_of(model)[index] is None]
    if len(set(stateful)) < len(stateful):
        raise DecodingError(
            "layers of the main head must not be of a kind that carries a state, for texts to be generated",
            f"{type(model.heads).__name__} with layers like number {max(stateful)} of the trunk",
            GENERATE_ELSEWHERE,
        )


def knows_slots(model: MtpModel) -> bool:
    """Whether scores depend on the slots of keys (ALiBi): those of a tree's nodes are not their positions."""
    return any(span is not None and span.by_slot for span in spans_of(model))


def rotary_switch(model: MtpModel) -> int | None:
    """Length from which on all positions of a text turn by other angles (rope type longrope); None where none is."""
    if not isinstance(model.trunk, TransformersTrunk):
        return None
    parameters = getattr(model.trunk.architecture.config, "rope_parameters", None) or {}
    for kind in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if kind.get("rope_type") == "longrope":
            return int(kind["original_max_position_embeddings"])
    return None


@final
class TransformersWindows:
    """Prepares calls of layers for one batch of texts."""

    def __init__(self, model: MtpModel) -> None:
        assert isinstance(model.trunk, TransformersTrunk)
        self.trunk = model.trunk
        self.last_position = model.section.max_position_embeddings - 1
        self.spans = spans_of(model)
        config = self.trunk.architecture.config
        self.states = library().DynamicCache(config=config) if None in self.spans else None

    def __call__(self, positions: Tensor, seen: Tensor | None, key_positions: Tensor) -> LayerInputs:
        """Prepare a window.

        Args:
            positions: (B, T) of the tokens in their texts.
            seen: (B, 1, T, S) slots that hold a token's past; None if all rows are alike, and T is 1 or S.
            key_positions: (B or 1, S) of the tokens whose keys the slots hold.
        """
        inputs = _inputs(self.trunk, positions.clamp(max=self.last_position), key_positions.shape[1])
        masks: dict[Span, Tensor | None] = {}
        for span, call in zip(self.spans, inputs.calls, strict=True):
            if span is None:
                call.update({name: self.states for name in PAST if name in call})
                continue
            if span not in masks:
                masks[span] = _mask(span, positions, seen, key_positions, call[MASK])
            call[MASK] = masks[span]
        return inputs


def _inputs(trunk: TransformersTrunk, positions: Tensor, reach: int, *, embedding: float = 0.0) -> LayerInputs:
    weight = trunk.embed_tokens.weight
    embedded = weight.new_full((*positions.shape, weight.shape[1]), embedding)
    past = PastLength(positions.shape[1], reach)
    return trunk.inputs(embedded, positions, past_key_values=past, use_cache=True)


def _mask(
    span: Span, positions: Tensor, seen: Tensor | None, key_positions: Tensor, theirs: Tensor | None
) -> Tensor | None:
    """Build a layer's mask, (B, 1 or H, T, S), in the form of theirs."""
    if seen is None and span.skips and span.sees_all(key_positions.shape[1]):
        return None
    query, key = positions[:, None, :, None], key_positions[:, None, None]  # (B, 1, T, 1), (B, 1, 1, S)
    seen = key <= query if seen is None else seen
    if span.window is not None:
        seen = seen & (key > query - span.window)
    if span.chunk is not None:
        seen = seen & (key // span.chunk == query // span.chunk)
    if theirs is None or theirs.dtype == torch.bool:
        return seen if span.shown else ~seen
    shown = theirs[:, :, -1:] if span.adds else theirs.new_tensor(span.shown)
    return torch.where(seen, shown, torch.finfo(theirs.dtype).min)


def _measured(trunk: TransformersTrunk, context: int) -> list[Span | None]:
    zeros = torch.zeros(1, 2, dtype=torch.long, device=trunk.embed_tokens.weight.device)
    try:
        near, far = (_inputs(trunk, zeros, reach).calls for reach in (2, context))
        other = _inputs(trunk, zeros, 2, embedding=1.0).calls
    except MtpError:
        raise
    except Exception as error:  # whatever a decoder makes of a past that is not its own
        raise _refused(trunk, f"{type(error).__name__}: {error}") from error
    if not all(map(_is_alike, near, other)):
        raise _refused(trunk, "layers that read embedded tokens beside the state of the layer before")
    if not all(any(name in call for name in PAST) for call in far):
        raise _refused(trunk, "layers that take no keys and values of earlier positions")
    for layer in trunk.layers:
        _check_tables(trunk, layer)
    return [
        None if more else _span(trunk, last, skips=first.get(MASK) is None, context=context)
        for first, last, more in zip(near, far, _keep_more(trunk), strict=True)
    ]


def _keep_more(trunk: TransformersTrunk) -> list[bool]:
    """Say of each layer whether transformers keeps more for it than keys and values: a state, or what chooses keys."""
    num_layers, caches = len(trunk.architecture.layers), library().cache_utils
    try:
        kept = caches.DynamicCache(config=trunk.architecture.config).layers
    except Exception:  # settings that its general cache knows nothing of: layers say themselves what they ask for
        return [False] * num_layers
    plain = (caches.DynamicLayer, caches.DynamicSlidingWindowLayer, caches.DummyLayer)
    return [type(one) not in plain for one in kept] if len(kept) == num_layers else [False] * num_layers


def _is_alike(first: Any, second: Any) -> bool:
    """Compare what a layer is called with, tensors by their values and the rest not at all."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return all(_is_alike(value, second[name]) for name, value in first.items())
    if isinstance(first, tuple | list):
        return all(map(_is_alike, first, second))
    return True


def _span(trunk: TransformersTrunk, call: dict[str, Any], *, skips: bool, context: int) -> Span | None:
    """Read a layer's mask for the last two positions: (1, 1 or H, 2, C)."""
    mask = call.get(MASK)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    hidden, shown = mask[0, 0, 0, -1], mask[0, 0, 1, -1]
    seen = mask[0, 0] != hidden  # (2, C)
    before, last = seen.sum(1).tolist()
    adds = mask.is_floating_point() and bool((mask[0, :, 1][:, seen[1]] != shown).any())
    chunk = getattr(trunk.architecture.config, "attention_chunk_size", None)
    is_end = bool(seen[1, context - last :].all() and seen[0, context - 1 - before : context - 1].all())
    of_chunk = chunk and ((context - 2) % chunk + 1, (context - 1) % chunk + 1)
    if (
        not is_end
        or ((before, last) not in ((context - 1, context), (last, last), of_chunk))
        or (adds and last < context)
    ):
        raise _refused(trunk, f"a layer whose last position attends to {last} of {context}, by no known rule")
    return Span(
        window=last if before == last else None,
        chunk=chunk if before != last and last < context else None,
        shown=float(shown),
        adds=adds,
        by_slot=adds or any(isinstance(call.get(name), Tensor) for name in ALIBI),
        skips=skips and not adds,
    )


def _check_tables(trunk: TransformersTrunk, layer: torch.nn.Module) -> None:
    """Refuse layers that hide positions by a table of their own, which knows no rows of different lengths."""
    for name, table in layer.named_buffers():
        if table.dim() == 4 and table.dtype == torch.bool and not bool(table[0, 0, -1].all()):
            raise _refused(trunk, f"a table {name} of what its layers attend to, beside the mask")


def _refused(trunk: TransformersTrunk, found: str) -> DecodingError:
    return DecodingError(
        "layers must attend to past positions by a mask that can be told, for texts to be generated; those of "
        f"{trunk.architecture.name} do not",
        found,
        GENERATE_ELSEWHERE,
    )
