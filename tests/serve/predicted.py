"""Drafts that an engine keeps, from passes over the finished text alone."""

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


def reapplied_counts(model: MtpModel, prompt: Ids, text: Ids, num_tokens: int, num_drafts: int) -> list[int]:
    """Count the same where one module drafts all tokens, as vLLM runs it.

    Its keys and values of the text are those of the first draft; further drafts are one more row behind them, made of
    the state and the token of the draft before.
    """
    padded = torch.tensor([[*text, *[0] * model.num_offsets]])
    trunk = model.hidden_states(padded, torch.zeros_like(padded), [1])[1]
    counts: list[int] = []
    while (emitted := 1 + sum(counts) + len(counts)) < num_tokens:
        known = len(prompt) + emitted  # tokens of the text so far
        drafts = _drafts(model, trunk[:, : known - 1], text[:known], num_drafts)
        right = [draft == text[known + place] for place, draft in enumerate(drafts)]
        counts.append([*right, False].index(False))
    return counts


def _drafts(model: MtpModel, states: Tensor, tokens: list[int], num_drafts: int) -> list[int]:
    """Draft from the trunk's states (1, T-1, D) of a text of T tokens."""
    read, drafts = model.read(2, states), []
    for _ in range(num_drafts):
        following = torch.tensor([[*tokens[1:], *drafts]])
        inside = torch.zeros(1, following.shape[1] + model.num_offsets, dtype=torch.long)
        embedded = model.trunk.embed_tokens(following)
        made = model.heads.modules_of(2)[0](read, embedded, model.geometry(inside, like=embedded))[:, -1:]
        drafts.append(int(model.unembedding.logits(2, made).argmax()))
        read = torch.cat((read, model.read(3, made)), dim=1) if model.num_offsets > 2 else read
    return drafts
