"""One step of a decoder: draft, verify in one forward of the trunk, accept, commit."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, final

import torch
from torch import Tensor

from mtp_lightning.decode.drafting import Draft, draft_blockwise, draft_chain, head_scores
from mtp_lightning.decode.sampling import Generator, draw
from mtp_lightning.decode.settings import Decoder, Settings
from mtp_lightning.decode.state import DecodeState, keep_path, verify, verify_tree
from mtp_lightning.decode.tree import Tree, TreeTables, accept_tree_greedy, accept_tree_sampled
from mtp_lightning.decode.verify import AcceptResult, accept_greedy, accept_point_mass, accept_typical, rejection_sample

ForcedDrafts = Callable[[Tensor, int], Tensor]
"""Says what to draft in place of the heads' own drafts, which are computed all the same: lengths (B,), K -> (B, K)."""


@final
@dataclass(frozen=True)
class Step:
    """What one forward gave, for every row."""

    drafts: Tensor  # (B, K) proposed tokens; a tree's nodes in its order
    accepted: Tensor  # (B,) how many were kept
    block: Tensor  # (B, K+1) kept drafts and the token after them, then nothing of meaning
    kept: Tensor  # (B,) tokens of the block that are part of the text; fewer than accepted + 1 at its end
    is_active: Tensor  # (B,) rows that had not ended before


class Decoding(Protocol):
    """A decoder at work on a session."""

    generator: Generator

    def step(self, num_drafts: int) -> tuple[Tensor, AcceptResult]:
        """Draft, verify and commit; return the (B, K) drafts and what became of them."""

    def most_behind(self, num_drafts: int) -> int:
        """Count the positions that a draft may have to recompute, after a step with as many drafts."""


@final
class ChainDecoding:
    """Decoders `greedy` (no drafts), `blockwise` and `chain`: one path of drafts."""

    def __init__(
        self, session: DecodeState, settings: Settings, decoder: Decoder, forced_drafts: ForcedDrafts | None
    ) -> None:
        self.session = session
        self.settings = settings
        self.draft = draft_chain if decoder == "chain" else draft_blockwise
        self.forced_drafts = forced_drafts
        self.generator: Generator = session.generator

    def step(self, num_drafts: int) -> tuple[Tensor, AcceptResult]:
        """Take one step; see `Decoding`."""
        drafts = self._drafts(num_drafts)
        result = self._accept(verify(self.session, drafts.tokens), drafts)
        self.session.commit(result.block, result.accepted)
        return drafts.tokens, result

    def most_behind(self, num_drafts: int) -> int:
        """Count positions; see `Decoding`. Modules that read tokens have guessed those of the last ones."""
        guessed = num_drafts - 1 if self.draft is draft_chain else 0
        return num_drafts + 1 + guessed

    def _drafts(self, num_drafts: int) -> Draft:
        if num_drafts == 0:
            return Draft(self.session.tokens[:, :0], None)
        drafts = self.draft(self.session, num_drafts, self._choose)
        if self.forced_drafts is None:
            return drafts
        return Draft(self.forced_drafts(self.session.lengths, num_drafts), None)

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.settings.sample_drafts:
            return scores.argmax(-1), None
        probs = self.settings.sampling.probabilities(scores)
        return draw(probs, self.generator), probs

    def _accept(self, scores: Tensor, drafts: Draft) -> AcceptResult:
        settings, sampling, generator = self.settings, self.settings.sampling, self.generator
        if sampling.is_greedy:
            return accept_greedy(scores, drafts.tokens)
        if settings.typical:
            limits = {"epsilon": settings.typical_epsilon, "delta": settings.typical_delta}
            return accept_typical(scores, drafts.tokens, sampling, generator, **limits)
        if drafts.drawn_from is not None:
            return rejection_sample(scores, drafts.tokens, drafts.drawn_from, sampling, generator)
        return accept_point_mass(scores, drafts.tokens, sampling, generator)


@final
class TreeDecoding:
    """Decoder `tree`: several paths of drafts, of which one is kept."""

    def __init__(self, session: DecodeState, settings: Settings, tree: Tree) -> None:
        self.session = session
        self.sampling = settings.sampling
        self.tables = TreeTables(tree, session.device)
        self.generator: Generator = session.generator

    def step(self, num_drafts: int) -> tuple[Tensor, AcceptResult]:
        """Take one step; see `Decoding`. The tree says how many drafts there are."""
        session, tables = self.session, self.tables
        drafts = tables.fill(head_scores(session, tables.deepest))
        drafts = drafts if session.vocabulary is None else session.vocabulary.spoken(drafts)
        nodes = torch.cat((session.tokens.gather(1, session.lengths[:, None]), drafts), dim=1)  # (B, T)
        scores, states = verify_tree(session, nodes, tables.depths, tables.ancestry)
        if self.sampling.is_greedy:
            result, path = accept_tree_greedy(scores, nodes, tables)
        else:
            result, path = accept_tree_sampled(scores, nodes, tables, self.sampling, self.generator)
        keep_path(session, states, path)
        session.commit(result.block, result.accepted)
        return drafts, result

    def most_behind(self, num_drafts: int) -> int:
        """Count positions; see `Decoding`."""
        return num_drafts + 1
