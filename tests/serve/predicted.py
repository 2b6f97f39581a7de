"""Drafts that an engine keeps, from passes over the finished text alone."""

import copy

import torch
from torch import Tensor

from mtp_lightning.evaluation.export_parity import predicted_accepts, scores
from mtp_lightning.model.mtp_model import MtpModel

Ids = list[int]


def predicted_counts(model: MtpModel, prompt: Ids, text: Ids, num_tokens: int, num_drafts: int) -> list[int]:
    """Count what every step keeps, by one teacher-forced pass (law 7); each draft is an offset of its own.

    `text` is the prompt and more than `num_tokens` new tokens, as many more as there are offsets.
    """
    logits = {offset: one for offset, one in scores(model, text).items() if offset <= num_drafts + 1}
    return predicted_accepts(logits, len(prompt), text, num_tokens)


def counts_of_all_ids(model: MtpModel, prompt: Ids, text: Ids, num_tokens: int, num_drafts: int) -> list[int]:
    """Count the same where the engine lets heads score every id, whatever their draft vocabulary is here."""
    whole = copy.deepcopy(model)
    whole.unembedding.drafts = None
    return predicted_counts(whole, prompt, text, num_tokens, num_drafts)


def reapplied_counts(model: MtpModel, prompt: Ids, text: Ids, num_tokens: int, num_drafts: int) -> list[int]:
    """Count the same where one module drafts all tokens, as vLLM runs it.

    Its keys and values of the text are those of the first draft; further drafts are one more row behind them, made of
    the state and the token of the draft before.
    """
    states = trunk_states(model, text)
    counts: list[int] = []
    while (emitted := 1 + sum(counts) + len(counts)) < num_tokens:
        known = len(prompt) + emitted  # tokens of the text so far
        drafts = _drafts(model, states[:, : known - 1], text[1:known], num_drafts)
        counts.append(num_right(drafts, text[known:]))
    return counts


def counts_in_llama_cpp(
    model: MtpModel, prompt: Ids, text: Ids, num_tokens: int, num_drafts: int, pending: Tensor | None = None
) -> tuple[list[int], list[int]]:
    """Count drafts, and kept ones, as llama.cpp runs the module: likewise, but for two things.

    The text's first token has a row too, beside `pending` (1, 1, D), what the answer before has left there
    (`left_pending`; zeros at first); and no more is drafted than may still be said.
    """
    states = trunk_states(model, text)
    states = torch.cat((torch.zeros_like(states[:, :1]) if pending is None else pending, states), dim=1)
    drafted: list[int] = []
    kept: list[int] = []
    while (wanted := min(num_drafts, num_tokens - 2 - sum(kept) - len(kept))) > 0:
        known = len(prompt) + 1 + sum(kept) + len(kept)
        drafts = _drafts(model, states[:, :known], text[:known], wanted)
        drafted.append(wanted)
        kept.append(num_right(drafts, text[known:]))
    return drafted, kept


def left_pending(model: MtpModel, prompt: Ids, text: Ids, num_tokens: int) -> Tensor:
    """The state (1, 1, D) that an answer leaves behind in llama.cpp b11434, that gave its last token."""
    last = len(prompt) + num_tokens - 2
    return trunk_states(model, text)[:, last : last + 1]


def num_right(drafts: Ids, following: Ids) -> int:
    """Count the drafts before the first wrong one."""
    return ([draft == following[place] for place, draft in enumerate(drafts)] + [False]).index(False)


def trunk_states(model: MtpModel, text: Ids) -> Tensor:
    """What the module reads of the text, (1, T, D), by one pass."""
    padded = torch.tensor([[*text, *[0] * model.num_offsets]])
    return model.read(2, model.hidden_states(padded, torch.zeros_like(padded), [1])[1])


def _drafts(model: MtpModel, states: Tensor, tokens: Ids, num_drafts: int) -> list[int]:
    """Draft from the states (1, T, D) that the module reads, and the token behind each."""
    drafts: list[int] = []
    for _ in range(num_drafts):
        following = torch.tensor([[*tokens, *drafts]])
        inside = torch.zeros(1, following.shape[1] + model.num_offsets, dtype=torch.long)
        embedded = model.trunk.embed_tokens(following)
        made = model.heads.modules_of(2)[0](states, embedded, model.geometry(inside, like=embedded))[:, -1:]
        drafts.append(int(model.unembedding.logits(2, made).argmax()))
        states = torch.cat((states, model.read(3, made)), dim=1) if model.num_offsets > 2 else states
    return drafts
