"""A batch of texts in the making: its tokens, its cache, and the forward passes of trunk and main head.

A row of length m has the trunk's states of its first m tokens; token m is committed too, but not yet fed.
"""

from collections.abc import Collection, Sequence
from typing import final

import torch
from torch import Tensor

from mtp_lightning.decode.kv_cache import Cache, Window, has_layers
from mtp_lightning.decode.packed_linear import draft_map
from mtp_lightning.decode.transformers_windows import check_states
from mtp_lightning.model.heads import TRUNK, HeadContext
from mtp_lightning.model.mtp_model import MtpModel


@final
class DecodeState:
    """What decoders read and write."""

    def __init__(
        self, model: MtpModel, prompts: Sequence[Sequence[int]], *, max_drafts: int, remaining: int, seed: int
    ) -> None:
        """Prepare a batch, without running the model.

        Args:
            model: The model.
            prompts: Token ids of each row, none empty.
            max_drafts: Deepest offset that will draft, less one.
            room: Positions to hold behind the longest prompt, drafts included.
            seed: Seed of everything that is drawn.
        """
        self.model = model
        self.device = model.trunk.embed_tokens.weight.device
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.path = main_path(model)
        check_states(model, self.path)
        drafting = range(2, 2 + max_drafts)
        self.drafting = [offset for offset in drafting if offset not in self.path]
        self.cache = Cache(model, len(prompts), max(map(len, prompts)) + remaining + 1)
        self.rows = torch.arange(len(prompts), device=self.device)
        self.tokens = torch.zeros(len(prompts), self.cache.capacity, dtype=torch.long, device=self.device)  # (B, C)
        self.prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
        self.tokens[:, : padded.shape[1]] = padded
        self.is_finished = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        self.shortest, self.longest, self.all_finished = 0, 0, False  # what the host knows
        self.catches_up = any(has_layers(model, offset) for offset in self.drafting)
        self.valid = {offset: torch.zeros_like(self.cache.lengths) for offset in self.drafting}
        self.spans: dict[int, tuple[int, int, int]] = {}  # first and last of `valid`, and the most rows that are not
        self.fixed_width: int | None = None  # see `fix_shapes`
        unembedding = model.unembedding
        self.vocabulary = unembedding.drafts  # of drafts; None for all V
        scored = {unembedding.matrix_index(offset) for offset in drafting} if self.vocabulary is not None else set()
        self.draft_maps = {index: draft_map(unembedding, index) for index in scored}
        read = {model.parent_of(offset) for offset in self.drafting} - {*self.drafting}
        self.draft_states = self._allocate_anchors(read | ({*drafting} & {*self.path}))

    def _allocate_anchors(self, offsets: Collection[int]) -> dict[int, Tensor]:
        """Hold the states that drafting begins from, at every position: (B, C, D) for each that `source` names."""
        shape = (*self.tokens.shape, self.model.section.hidden_size)
        weight = self.model.trunk.embed_tokens.weight
        return {offset: weight.new_zeros(shape) for offset in offsets}

    @property
    def lengths(self) -> Tensor:
        """Positions that the trunk has computed: (B,)."""
        return self.cache.lengths

    def run(self, fed: Tensor, window: Window) -> dict[int, Tensor]:
        """Run trunk and main head over a window: (B, T) tokens -> (B, T, D) per offset on the way, and the trunk's."""
        model = self.model
        embedded = model.trunk.embed_tokens(fed)  # (B, T, D)
        states = model.trunk_states(embedded, self.cache.geometry(window, TRUNK))
        for offset in self.path:
            source = model.parent_of(offset)
            context = HeadContext(self.cache.geometry(window, offset), embedded)
            states[offset] = model.heads(offset, model.read(offset, states[source]), context)
        return states

    def draft_scores(self, offset: int, state: Tensor) -> Tensor:
        """Score what an offset may draft: (..., D) -> (..., V), or (..., V') of a draft vocabulary."""
        unembedding = self.model.unembedding
        if self.vocabulary is None:
            return unembedding.logits(offset, state)
        return self.draft_logits(unembedding.matrix_index(offset), unembedding.normalize(offset, state))

    def draft_logits(self, index: int, normed: Tensor) -> Tensor:
        """Score the draft vocabulary by rows of a matrix: normed (..., D) -> (..., V')."""
        return self.model.unembedding.logit_map(self.draft_maps[index](normed))

    def keep_anchors(self, states: dict[int, Tensor], slots: Tensor) -> None:
        """Keep the states that drafting begins from: (B, T, D) at (B, T) slots."""
        index = (self.cache.row_starts + slots).flatten()
        for offset, kept in self.draft_states.items():
            kept.view(-1, kept.shape[-1]).index_copy_(0, index, states[offset].flatten(0, 1))

    def fix_shapes(self, most_behind: int) -> None:
        """Let windows be as wide and reach as far from now on, whatever the lengths: of all slots, under a mask.

        Where drafting begins is not kept in mind any more: as far back as it may have to.

        Args:
            most_behind: Most positions that drafting may find not valid.
        """
        self.fixed_width = most_behind if self.catches_up else 1
        self.shortest, self.longest = 0, self.cache.capacity

    def drafting_window(self, deepest: int) -> tuple[Tensor, Window]:
        """Open the window from the first row of an offset that is not valid to the last committed position.

        Returns:
            (B,) where it begins, and the window.
        """
        if self.fixed_width is not None:
            starts = (self.lengths - self.fixed_width).clamp_(min=0)
            return starts, self.cache.window(starts, self.fixed_width, reach=self.cache.capacity, aligned=False)
        if self.catches_up:
            starts = self.valid[deepest]  # deeper offsets are never ahead of shallower ones
            first, last, width = self.spans[deepest]
        else:
            starts, first, last, width = self.lengths - 1, self.shortest - 1, self.longest - 1, 1
        return starts, self.cache.window(starts, width, reach=last + width, aligned=first == last)

    def commit(self, block: Tensor, accepted: Tensor) -> None:
        """Append accepted drafts and the token after them to every row that is not finished: (B, K+1), (B,)."""
        slots = self.lengths[:, None] + torch.arange(1, block.shape[1] + 1, device=self.device)
        self.tokens.scatter_(1, slots, block)
        self.cache.lengths += torch.where(self.is_finished, 0, accepted + 1)

    def note_progress(self, *facts: Tensor) -> list[list[int]]:
        """Tell the host how far rows and drafting offsets are, after a commit; on a GPU it waits for that, once a step.

        Args:
            facts: (B,) integers, what else the host is to know of the rows. They are returned.
        """
        ahead = [*self.valid.values()] if self.catches_up else []
        noted = torch.stack((self.lengths, self.is_finished.long(), *facts, *ahead)).tolist()
        lengths, finished = noted[0], noted[1]
        self.shortest, self.longest, self.all_finished = min(lengths), max(lengths), all(finished)
        for offset, starts in zip(self.valid, noted[2 + len(facts) :], strict=False):
            self.spans[offset] = _span_of(lengths, starts)
        return noted[2 : 2 + len(facts)]


def _span_of(lengths: Sequence[int], starts: Sequence[int]) -> tuple[int, int, int]:
    return min(starts), max(starts), max(length - start for length, start in zip(lengths, starts, strict=True))


def main_path(model: MtpModel) -> list[int]:
    """List the offsets that must be computed for the main head, in order."""
    path = [1]
    while (source := model.heads.parent_of(path[0])) != TRUNK:
        path.insert(0, source)
    return path


def prefill(session: DecodeState) -> Tensor:
    """Run the prompts, each row from position 0, and return the main head's scores after its last token: (B, V)."""
    longest = int(session.prompt_lengths.max())
    window = session.cache.window(torch.zeros_like(session.lengths), longest, reach=longest, aligned=True)
    states = session.run(session.tokens[:, :longest], window)
    session.keep_anchors(states, window.slots)
    session.cache.lengths.copy_(session.prompt_lengths)
    last = states[1][session.rows, session.prompt_lengths - 1]  # (B, D)
    scores: Tensor = session.model.unembedding.logits(1, last)
    return scores


def verify(session: DecodeState, drafts: Tensor) -> Tensor:
    """Feed the committed token and (B, K) drafts of every row; return the main head's scores: (B, K+1, V).

    One forward of trunk and main head. Its keys, values and states stand at the positions that follow the row's
    length; `Session.commit` makes the accepted ones count, the next pass overwrites the rest.
    """
    num_fed = drafts.shape[1] + 1
    committed = session.tokens.gather(1, session.lengths[:, None])
    fed = torch.cat((committed, drafts), dim=1)
    aligned = session.shortest == session.longest
    window = session.cache.window(session.lengths, num_fed, reach=session.longest + num_fed, aligned=aligned)
    states = session.run(fed, window)
    session.keep_anchors(states, window.slots)
    scores: Tensor = session.model.unembedding.logits(1, states[1])
    return scores


def verify_tree(
    session: DecodeState, nodes: Tensor, depths: Tensor, ancestry: Tensor
) -> tuple[Tensor, dict[int, Tensor]]:
    """Feed the nodes of a tree, (B, T), the committed token first; return main head's scores (B, T, V) and states.

    One forward, in which every node sees the past and its own ancestors. `keep_path` makes one path of it the past.
    """
    window = session.cache.tree_window(depths, ancestry, reach=session.longest + nodes.shape[1])
    states = session.run(nodes, window)
    return session.model.unembedding.logits(1, states[1]), states


def keep_path(session: DecodeState, states: dict[int, Tensor], path: Tensor) -> None:
    """Move keys, values and states of the (B, P) nodes of a path to the positions that follow the row's length."""
    here = session.lengths[:, None]
    slots = here + torch.arange(path.shape[1], device=session.device)
    session.cache.move(session.path, here + path, slots)
    rows = session.rows[:, None]
    session.keep_anchors({offset: states[offset][rows, path] for offset in session.draft_states}, slots)
