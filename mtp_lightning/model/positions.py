"""Where each position stands and what it may attend to."""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple, Self

import torch
from torch import Tensor

from mtp_lightning.model.sequence_parallel import SequenceSlice, own_positions
from mtp_lightning.recipe.schema.model import ModelSection


class KVCache(ABC):
    """Keys and values of earlier positions, which attention goes on from; the T new ones are the last of all S."""

    num_positions: int  # T
    reach: int  # S

    @abstractmethod
    def extend(self, layer: object, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's keys and values of T new positions and return all S: two (B, K, T, W) -> two (B, K, S, W)."""


class AttentionInputs(NamedTuple):
    """Rotary tables and attention mask of a batch of windows.

    `mask` None means plain causal attention over the window, and to all of a past that comes before it; with `bounds`,
    causal attention inside each of the documents that lie end to end in the batch.

    With `sequence` the tables are those of this rank's slice of the windows; mask and bounds are of the whole windows.
    """

    cos: Tensor  # (B or 1, 1, T, R), R of a head's W channels are turned
    sin: Tensor  # (B or 1, 1, T, R)
    mask: Tensor | None  # (B, 1, T, S), true where attention is allowed; S = T without a past
    past: KVCache | None = None
    bounds: Tensor | None = None  # (documents + 1,) int32, where each begins in the B x T positions, and the last ends
    sequence: SequenceSlice | None = None

    @property
    def num_positions(self) -> int:
        """Length T of the windows."""
        return self.cos.shape[-2]

    def with_past(self, past: KVCache) -> Self:
        """Let layers go on from keys and values of earlier positions."""
        return self._replace(past=past)


def window_geometry(
    num_positions: int, section: ModelSection, *, like: Tensor, sequence: SequenceSlice | None = None
) -> AttentionInputs:
    """Attend causally over the whole window; positions count from its start. `like` gives dtype and device."""
    positions = own_positions(torch.arange(num_positions, device=like.device)[None], sequence)  # (1, T)
    return AttentionInputs(*rotary_tables(positions, section, like=like), None, sequence=sequence)


def document_geometry(
    documents: Tensor,
    section: ModelSection,
    *,
    like: Tensor,
    starts: Tensor | None = None,
    sequence: SequenceSlice | None = None,
) -> AttentionInputs:
    """Attend causally within each document only; positions restart at every document.

    Args:
        documents: (B, T) number of the document each position belongs to; equal numbers are contiguous.
        section: Says how positions turn the channels of a head.
        like: Tensor whose dtype and device the tables take.
        starts: (B, M) as by `document_starts`: attention then runs over the documents one by one, without the
            (B, 1, T, T) mask, and costs what they cost.
        sequence: This rank's slice, where the windows are cut over ranks.
    """
    positions = own_positions(positions_in_document(documents), sequence)
    tables = rotary_tables(positions, section, like=like)
    if starts is not None:
        num_rows, num_positions = documents.shape
        rows = torch.arange(0, num_rows * num_positions, num_positions, device=starts.device)[:, None]
        bounds = torch.nn.functional.pad((starts + rows).flatten(), (0, 1), value=num_rows * num_positions)
        return AttentionInputs(*tables, None, bounds=bounds.to(torch.int32), sequence=sequence)
    same = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
    mask = torch.tril(same)[:, None]  # (B, 1, T, T)
    return AttentionInputs(*tables, mask, sequence=sequence)


def positions_in_document(documents: Tensor) -> Tensor:
    """Count positions from the first one of each document: (B, T) -> (B, T)."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def rotary_tables(positions: Tensor, section: ModelSection, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, two equal halves as in HF: (B, T) -> two (B, 1, T, R).

    They come in the type of queries and keys, which autocast lowers: in a higher one these would be turned in it, and
    rounded back.
    """
    device = like.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
    exact = torch.promote_types(like.dtype, torch.float32)
    exponents = torch.arange(0, section.rotary_width, 2, device=positions.device, dtype=exact) / section.rotary_width
    frequencies = _scaled(1.0 / section.resolved_rope_theta**exponents, section)
    angles = positions[:, None, :, None].to(exact) * frequencies  # (B, 1, T, R/2)
    angles = torch.cat((angles, angles), dim=-1)
    scale = 1.0 if section.rope_scaling is None else section.rope_scaling.resolved_attention_factor
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def _scaled(frequencies: Tensor, section: ModelSection) -> Tensor:
    """Slow frequencies down as `model.rope_scaling` says: (R/2,) -> (R/2,)."""
    scaling = section.rope_scaling
    if scaling is None or scaling.kind in ("ntk", "dynamic"):  # a larger base, or as they are up to the longest window
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "yarn":
        width, span = section.rotary_width, math.log(section.rope_theta) or 1e-9
        waves = (scaling.original_positions / (2 * math.pi * turns) for turns in (scaling.beta_fast, scaling.beta_slow))
        first, last = (width * math.log(wave) / (2 * span) for wave in waves)  # pairs of channels that turn so often
        low: float = max(math.floor(first), 0)
        high: float = min(math.ceil(last), width - 1)
        pairs = torch.arange(len(frequencies), device=frequencies.device)
        slowed = ((pairs - low) / (high - low or 0.001)).clamp(0, 1)
        return frequencies * (1 - slowed + slowed / scaling.factor)
    turns = scaling.original_positions * frequencies / (2 * math.pi)  # within the window of the first training
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rotate(states: Tensor, geometry: AttentionInputs) -> Tensor:
    """Apply the rotary embedding to the first R channels of queries or keys: (B, H, T, W) -> (B, H, T, W)."""
    width = geometry.cos.shape[-1]
    if width < states.shape[-1]:
        return torch.cat((_turned(states[..., :width], geometry), states[..., width:]), dim=-1)
    return _turned(states, geometry)


def _turned(states: Tensor, geometry: AttentionInputs) -> Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * geometry.cos + torch.cat((-second, first), dim=-1) * geometry.sin
