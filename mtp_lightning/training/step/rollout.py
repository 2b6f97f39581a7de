"""On-policy training (`objective.rollout`): at positions that are drawn, far offsets read the heads' own drafts.

A decoder that drafts at position t has computed every earlier position with the tokens of the text, and reads its own
drafts at t alone. From offset 3 on the modules therefore run over two streams, one behind the other [HASS, EAGLE-3]:

    given  (T)    reads the given tokens; attends to given positions up to itself
    own    (T)    reads the drafts made at this position; attends to given positions before itself, and to itself

The own stream is scored; what it drafts is what the next offset reads. Its drafts are those of the decoder up to the
one after the first that is wrong, behind which nothing is kept. Choices have no gradient; embeddings of what was chosen
have one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_lightning.losses.chunked import Term
from mtp_lightning.losses.row_losses import CrossEntropy
from mtp_lightning.losses.targets import IGNORE
from mtp_lightning.model.heads import HeadContext
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.model.positions import AttentionInputs
from mtp_lightning.recipe.schema.root import Recipe
from mtp_lightning.training.step.batch import MicroBatch

FIRST = 3  # offset that may read a draft: the second reads the main head's token, which a decoder has committed


@dataclass(frozen=True)
class RolloutDraw:
    """Which positions of a step are drawn: a pure function of seed, step and the tokens of a row."""

    seed: int
    step: int
    probability: float
    replaces: bool  # drafts replace tokens; else positions behind a wrong draft are left out of the loss

    @classmethod
    def at(cls, recipe: Recipe, step: int) -> "RolloutDraw | None":
        """Return a recipe's draw at a 0-based step; None where nothing is drawn."""
        section = recipe.objective.rollout
        if section is None or not (probability := section.probability_at(step)):
            return None
        return cls(recipe.run.seed, step, probability, section.where == "all")

    def positions(self, tokens: Tensor, num_positions: int) -> Tensor:
        """Draw positions of rows, whichever rank and micro-batch they are in: (B, T+n) -> (B, T).

        In integers, so that every device draws the same.
        """
        index = torch.arange(tokens.shape[1], device=tokens.device)
        rows = _scrambled(tokens + _scrambled(index)).sum(1, keepdim=True)  # (B, 1)
        key = _scrambled(_scrambled(torch.tensor(self.seed, device=tokens.device)) + self.step)
        bits: Tensor = _scrambled(_scrambled(rows + key) + index[:num_positions]) & (2**53 - 1)
        return bits < int(self.probability * 2**53)


def _scrambled(values: Tensor) -> Tensor:
    """Mix the bits of int64 values, wrapping around: the finaliser of SplitMix64."""
    values = values - 0x61C8864680B583EB
    values = (values ^ _shifted(values, 30)) * -0x40A7B892E31B1A47
    values = (values ^ _shifted(values, 27)) * -0x6B2FB644ECCEEE15
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    shifted: Tensor = (values >> bits) & (2 ** (64 - bits) - 1)  # zeros come in, whatever the sign
    return shifted


class Rollout:
    """Drafts of a micro-batch, offset by offset, and what far offsets make of them.

    Attributes:
        on_text: for each offset, (B, T) false where a position is drawn and a draft before is not the given token.
        num_off_text: number of targets of each offset whose position is off the text, by offset.
    """

    def __init__(self, model: MtpModel, batch: MicroBatch, draw: RolloutDraw) -> None:
        self.model, self.batch, self.replaces = model, batch, draw.replaces
        self.num_positions = batch.targets.shape[2]
        self.drawn = draw.positions(batch.tokens, self.num_positions)
        self.on_text = {FIRST - 1: torch.ones_like(self.drawn)}
        self.num_off_text: dict[int, Tensor] = {}
        self.drafts: Tensor | None = None  # (B, T) of the last offset
        self.geometry: AttentionInputs | None = None

    def wants_draft(self, offset: int) -> bool:
        """Return whether a later offset may read what this one drafts."""
        return FIRST - 1 <= offset < self.model.num_offsets

    def run(self, offset: int, source: Tensor, context: HeadContext) -> Tensor:
        """Compute an offset: (B, T, D) or two streams (B, 2T, D) -> the same, two streams from offset 3 on."""
        if offset >= FIRST and self.replaces:
            assert self.drafts is not None
            given = context.tokens_between(offset)
            own = torch.where(self.drawn[..., None], self.model.embed_drafts(self.drafts).to(given.dtype), given)
            source = source if source.shape[1] > self.num_positions else torch.cat((source, source), 1)
            context = HeadContext(self._geometry(context), context.embedded, torch.cat((given, own), 1))
        hidden: Tensor = self.model.heads(offset, source, context)
        return hidden

    def run_and_draft(self, offset: int, source: Tensor, context: HeadContext) -> Tensor:
        """Compute an offset and what it drafts, where its loss comes too late for that."""
        hidden = self.run(offset, source, context)
        if self.wants_draft(offset):
            self.draft(offset, hidden)
        return hidden

    def scored(self, hidden: Tensor) -> Tensor:
        """Return the stream that is scored: (B, T or 2T, D) -> (B, T, D)."""
        return hidden[:, -self.num_positions :]

    @torch.no_grad()
    def draft(self, offset: int, hidden: Tensor) -> None:
        """Choose an offset's drafts, a chunk of positions at a time."""
        nothing = torch.full_like(self.batch.targets[0], IGNORE).flatten()
        choice = CrossEntropy(nothing, smoothing=0.0, z_loss=0.0, predicts=True)
        term = Term(self.model.unembedding.term_matrix(offset), choice, torch.zeros((), device=hidden.device))
        self.model.unembedding([offset], [self.scored(hidden)], [term])
        assert choice.predictions is not None
        self.take(offset, choice.predictions)

    def take(self, offset: int, choices: Tensor) -> None:
        """Let the next offset read an offset's first choices, (P,) as its scores are numbered."""
        vocabulary = self.model.unembedding.vocabulary(offset)
        self.drafts = (choices if vocabulary is None else vocabulary.spoken(choices)).view_as(self.drawn)
        given = self.batch.tokens[:, offset : offset + self.num_positions]
        self.on_text[offset + 1] = self.on_text[offset] & ((self.drafts == given) | ~self.drawn)
        targets = self.batch.targets[offset]  # of the next offset
        self.num_off_text[offset + 1] = ((targets != IGNORE) & ~self.on_text[offset + 1]).sum()

    def learns_at(self, offset: int) -> Tensor | None:
        """Return where an offset learns, (P,); None for everywhere."""
        return self.on_text[offset].flatten() if offset >= FIRST and not self.replaces else None

    def _geometry(self, context: HeadContext) -> AttentionInputs:
        """Positions and attention of both streams."""
        if self.geometry is None:
            assert isinstance(context.geometry, AttentionInputs)  # as a rule of recipes says
            cos, sin, mask, *_ = context.geometry
            if mask is None:
                shape = (self.num_positions, self.num_positions)
                mask = torch.ones(shape, dtype=torch.bool, device=cos.device).tril()[None, None]
            itself = torch.eye(self.num_positions, dtype=torch.bool, device=cos.device).expand_as(mask)
            given = torch.cat((mask, torch.zeros_like(mask)), -1)
            own = torch.cat((mask & ~itself, itself), -1)
            self.geometry = AttentionInputs(
                torch.cat((cos, cos), 2), torch.cat((sin, sin), 2), torch.cat((given, own), 2)
            )
        return self.geometry
