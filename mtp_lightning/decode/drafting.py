"""How the heads draft. Both ways end at the last committed position and leave the heads' caches ready for the next.

Offset k, computed at position p, reads its source at p and, in kinds that read tokens, token p+k-1. Its rows are
valid while that token is committed. Every draft therefore begins at the first row of the deepest offset that is not
valid, and recomputes from there with the true tokens what earlier drafts had guessed.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mtp_lightning.decode.kv_cache import Window
from mtp_lightning.decode.state import DecodeState
from mtp_lightning.model.heads import HeadContext

Choose = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Turns scores (..., V) into tokens (...) and, if they are drawn, the probabilities (..., V) they were drawn by.

With a draft vocabulary both are of its V' entries: `_spoken` makes them ids of V, the others with probability 0.
"""


class Draft(NamedTuple):
    """Proposed tokens."""

    tokens: Tensor  # (B, K)
    drawn_from: Tensor | None  # (B, K, V), for drafts that were drawn at random


class _RecomputeSpan(NamedTuple):
    """The positions that a draft computes."""

    window: Window
    states: dict[int, Tensor]  # what drafting begins from, (B, T, D)
    last: Tensor  # (B,) index of the last committed position


def draft_blockwise(session: DecodeState, num_drafts: int, choose: Choose) -> Draft:
    """Draft with heads that read no tokens: all at once, from states that the verifying forward left [Stern 2018]."""
    return Draft(*_spoken(session, *choose(head_scores(session, num_drafts))))


def head_scores(session: DecodeState, num_drafts: int) -> Tensor:
    """Score the next tokens by offsets 2, 3, ... at the last committed position: (B, K, V or V')."""
    model, offsets = session.model, range(2, 2 + num_drafts)
    stretch = _stretch(session, offsets)
    states, is_fixed = stretch.states, session.fixed_width is not None
    reached = session.lengths if is_fixed else session.lengths.clone()
    for offset in offsets:
        if offset in session.path:
            continue
        source = model.read(offset, states[model.parent_of(offset)])
        geometry = session.cache.geometry(stretch.window, offset)
        states[offset] = model.heads(offset, source, HeadContext(geometry, source))
        if not is_fixed:
            session.valid[offset] = reached
    last = [states[offset][session.rows, stretch.last] for offset in offsets]  # (B, D) each
    if model.unembedding.is_replicated:
        return torch.stack([session.draft_scores(k, state) for k, state in zip(offsets, last, strict=True)], 1)
    normed = torch.stack([model.unembedding.normalize(k, state) for k, state in zip(offsets, last, strict=True)], 1)
    if session.vocabulary is not None:
        return session.draft_logits(0, normed)
    scores: Tensor = model.unembedding.lm_heads[0](normed)  # the matrix is read once for all
    return scores


def _spoken(session: DecodeState, tokens: Tensor, drawn_from: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Turn what was chosen among the scores into ids of the whole vocabulary."""
    vocabulary = session.vocabulary
    if vocabulary is None:
        return tokens, drawn_from
    return vocabulary.spoken(tokens), None if drawn_from is None else vocabulary.spread(drawn_from, 0.0)


def draft_chain(session: DecodeState, num_drafts: int, choose: Choose) -> Draft:
    """Draft with modules that read tokens: offset k+1 reads the token that offset k has just drafted."""
    model, offsets = session.model, range(2, 2 + num_drafts)
    stretch = _stretch(session, offsets)
    states, last = stretch.states, stretch.last
    slots = stretch.window.slots[:, :1] + torch.arange(
        stretch.window.slots.shape[1] + model.num_offsets, device=session.device
    )
    known = session.tokens.gather(1, slots.clamp(max=session.cache.capacity - 1))
    embedded = model.trunk.embed_tokens(known)  # (B, T+n, D); what is not committed yet is overwritten or not used
    tokens, laws = [], []
    for offset in offsets:
        if offset not in session.path:
            source = model.read(offset, states[model.parent_of(offset)])
            context = HeadContext(session.cache.geometry(stretch.window, offset), embedded)
            states[offset] = model.heads(offset, source, context)
            if session.fixed_width is None:
                session.valid[offset] = (session.lengths - (offset - 2)).clamp_(min=0)
        scores = session.draft_scores(offset, states[offset][session.rows, last])
        token, probs = _spoken(session, *choose(scores))
        embedded[session.rows, last + offset] = model.trunk.embed_tokens(token)
        tokens.append(token)
        laws += [] if probs is None else [probs]
    return Draft(torch.stack(tokens, 1), torch.stack(laws, 1) if laws else None)


def _stretch(session: DecodeState, offsets: range) -> _RecomputeSpan:
    """Open the window from the first row that is not valid to the last committed position."""
    starts, window = session.drafting_window(offsets[-1])
    rows = session.rows[:, None]
    states = {offset: kept[rows, window.slots] for offset, kept in session.draft_states.items()}
    return _RecomputeSpan(window, states, session.lengths - 1 - starts)
