"""Three orders of forward and backward through the heads, all with the same gradients.

sequential  one head at a time: forward, chunked loss, backward, freed; the trunk last [Gloeckle 2024, section 2.2]
bridged     ordinary graph up to the hidden states, one autograd node for all chunked losses, one backward
joint       the full logits of all heads in one graph, one backward: the oracle, slow and large
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mtp_lightning.losses import reference
from mtp_lightning.losses.distillation import Distillation
from mtp_lightning.losses.targets import IGNORE
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.recipe.schema.objective import DistillSection
from mtp_lightning.recipe.trainable import offsets_to_run
from mtp_lightning.training.step.batch import MicroBatch
from mtp_lightning.training.step.objective import LossTerms, Objective, OffsetLosses


@torch.no_grad()
def evaluate(model: MtpModel, batch: MicroBatch, objective: Objective) -> OffsetLosses:
    """Losses, predictions and overlaps of every offset on the given tokens, one after the other, without gradients."""
    section = objective.section.model_copy(update={"distill": None, "balance": "none"})
    plain = replace(objective, section=section, rollout=None)
    terms = LossTerms(model, batch, plain)
    overlaps = torch.ones_like(batch.targets, dtype=plain.coefficients.dtype)
    hiddens = model.hidden_states(batch.tokens, batch.documents, starts=batch.starts, sequence=batch.sequence)
    hiddens = {offset: terms.scored(offset, hidden) for offset, hidden in hiddens.items()}
    for offset, hidden in hiddens.items():
        term = terms.for_offset(offset)[0]
        if offset == 1:
            model.unembedding([1], [hidden], [term])
            continue
        distances = torch.ones_like(overlaps[0].flatten())
        term.distillation = _distance(terms, offset, distances)
        model.unembedding([offset], [hidden], [term], teacher=hiddens[1])
        overlaps[offset - 1] -= distances.view_as(overlaps[0])
    return terms.losses()._replace(overlaps=overlaps)


def _distance(terms: LossTerms, offset: int, distances: Tensor) -> Distillation:
    """Compare all of an offset's distribution with the main head's by total variation, kept for each row."""
    section = DistillSection(divergence="tv", top_k=terms.model.section.vocab_size)
    has_teacher, weight = terms.has_teacher[offset - 1].flatten(), torch.zeros_like(terms.objective.coefficients[0])
    unembedding = terms.model.unembedding
    matrix, drafts = unembedding.matrix_index(1), unembedding.drafts
    columns = None if drafts is None else drafts.on(has_teacher.device).ids
    return Distillation(section, offset - 1, has_teacher, weight, matrix, row_losses=distances, columns=columns)


Backward = Callable[[Tensor], None]


def accumulate_gradients(model: MtpModel, batch: MicroBatch, objective: Objective, backward: Backward) -> OffsetLosses:
    """Add the gradients of one micro-batch to the parameters, in the backward order that the recipe names.

    Args:
        model: trunk, heads and unembedding.
        batch: sequences with targets.
        objective: the step's loss.
        backward: runs the backward pass of a scalar; called several times by the sequential order.
    """
    if model.router_loss is not None:
        model.router_loss.weight = objective.share_of(batch)
    return BACKWARD_ORDERS[objective.section.backward_order](model, batch, objective, backward)


def needed_offsets(model: MtpModel, objective: Objective) -> list[int]:
    """List the offsets with a weight and all that they read; the main head where others are compared with it."""
    with_loss = [offset for offset, weight in enumerate(objective.weights, start=1) if weight > 0]
    reads_main = objective.predicts or objective.section.distill is not None
    needed = offsets_to_run(with_loss, model.heads.parent_of, reads_main=reads_main)
    return [offset for offset in model.heads.offsets if offset in needed]


def sequential(model: MtpModel, batch: MicroBatch, objective: Objective, backward: Backward) -> OffsetLosses:
    """Run one head at a time; no two heads' logits ever exist together."""
    return SequentialBackward(model, batch, objective, backward).run()


class SequentialBackward:
    """The sequential backward order of one micro-batch [Gloeckle 2024, section 2.2, figure 2].

    Parallel heads, in order of time; `z` is the trunk's output, `z'` a leaf detached from it:

        forward    trunk ──► z            the trunk's graph stays until the end
                             │ detach
                             ▼
                             z' ──► head 1 ──► chunked loss 1     forward, then backward in one pass through loss and
                             │◄──────────────────────┘            head: adds to z'.grad; head 1's graph is freed
                             ├────► head 2 ──► chunked loss 2     the same
                             │◄──────────────────────┘
                             ⋮
                             ├────► head n ──► chunked loss n
                             │◄──────────────────────┘
        backward   trunk ◄── z'.grad      once, with the sum of all heads' gradients

    Chained heads detach between heads as well: forward runs from the trunk to the far head, backward from the far head
    to the trunk, each head in one pass with its own loss and the gradient of the head which read it:

        forward    z' ──► head 1 ──► h1 ─► h1' ──► head 2 ──► h2 ─► h2' ──► head 3 ──► loss 3
        backward   z'.grad ◄── head 1 ◄── h1'.grad ◄── head 2 ◄── h2'.grad ◄── head 3 ◄──┘
                             (+ loss 1 at h1)        (+ loss 2 at h2)

    So there are n + 1 backward passes, one for each head and one for the trunk; engines reduce gradients, and wait for
    that, in every one. Where drafts are read (rollouts), the loss comes before the heads that read, in its own pass.

    Alive at the peak: the trunk's graph, the graph of one head (of a chain: of all heads), one chunk of logits, (C, V),
    and one gradient of the unembedding. Never two heads' logits. Whatever is frozen runs without a graph, and no
    backward pass enters it.
    """

    def __init__(self, model: MtpModel, batch: MicroBatch, objective: Objective, backward: Backward) -> None:
        self.model, self.batch, self.backward = model, batch, backward
        self.terms = LossTerms(model, batch, objective)
        self.needed = needed_offsets(model, objective)
        self.main_rms: Tensor | None = None
        self.teacher: Tensor | None = None  # leaf of the main head's state: set before any other offset's loss

    def run(self) -> OffsetLosses:
        """Run trunk forward, all heads forward and backward, trunk backward."""
        model, batch = self.model, self.batch
        embedded = model.embed(batch.tokens)
        geometry = model.geometry(batch.documents, like=embedded, starts=batch.starts, sequence=batch.sequence)
        leaf = embedded.detach().requires_grad_(model.heads.reads_tokens and embedded.requires_grad)
        self.context = model.context(leaf, geometry)
        states = model.states_of_rows(batch.tokens, batch.documents, embedded, geometry)
        leaves = self.run_all(states)
        self.backward_teacher(leaves)
        losses = [self.surrogate_loss(states[name], leaves[name]) for name in leaves if states[name].requires_grad]
        if losses:
            if leaf.grad is not None:
                losses.append(self.surrogate_loss(embedded, leaf))
            self.backward(functools.reduce(torch.add, losses))
        return self.terms.losses()

    def run_all(self, states: dict[int, Tensor]) -> dict[int, Tensor]:
        """Run all heads from the trunk's states that any of them reads, the main head's first.

        Returns:
            Leaves, (B, T, D), detached from these states, whose `grad` is the gradient of all losses.
        """
        leaves: dict[int, Tensor] = {}
        for name in dict.fromkeys(self.model.parent_of(offset) for offset in self.needed):
            if name in states:
                leaves[name] = _leaf_of(states[name])
                self.run_readers(name, leaves[name])
        return leaves

    def run_readers(self, offset: int, leaf: Tensor) -> None:
        """Run all that reads an offset's state, a leaf, (B, T, D), and what reads that; gradients come to the leaf."""
        for reader in self._readers(offset):
            self.run_offset(reader, self._head(reader, self.model.read(reader, leaf)))

    def run_offset(self, offset: int, hidden: Tensor) -> None:
        """Run an offset's loss and all that reads its state, (B, T, D), then backward through loss and head at once.

        A main head that is the trunk's output itself comes as the trunk's leaf, which takes the gradient.
        """
        if offset == 1:
            self._set_teacher(hidden)
        parts: list[Tensor] = []
        if not self._readers(offset):
            parts += self._losses(offset, hidden)
        else:
            leaf = _leaf_of(hidden)
            if offset == 1 and self.terms.objective.is_balanced:
                self._measure_main(leaf)
            drafts_first = self.terms.wants_draft(offset)
            if drafts_first:
                self._draft(offset, leaf)
            self.run_readers(offset, leaf)
            if hidden.requires_grad and leaf.grad is not None:
                parts.append(self.surrogate_loss(hidden, leaf))
            if not drafts_first:
                parts += self._losses(offset, hidden)
        if parts:
            self.backward(functools.reduce(torch.add, parts))

    def _readers(self, offset: int) -> list[int]:
        return [reader for reader in self.model.dependents(offset) if reader in self.needed]

    def _head(self, offset: int, source: Tensor) -> Tensor:
        run = self.model.heads if self.terms.rollout is None else self.terms.rollout.run
        hidden: Tensor = run(offset, source, self.context)
        return hidden

    def _draft(self, offset: int, leaf: Tensor) -> None:
        """Make an offset's drafts before the next one reads them: its loss, if it has one, comes first, and chooses."""
        rollout = self.terms.rollout
        assert rollout is not None
        if not self.terms.needs_loss(offset, leaf):
            rollout.draft(offset, leaf)
            return
        for loss in self._losses(offset, leaf):
            self.backward(loss)
        choices = self.terms.cross_entropies[offset].predictions
        assert choices is not None
        rollout.take(offset, choices)

    def _losses(self, offset: int, state: Tensor) -> list[Tensor]:
        """Compute an offset's loss where it is wanted; return it if there is a gradient of it."""
        if not self.terms.needs_loss(offset, state):
            return []
        loss = self._loss(offset, state)
        return [loss] if loss.requires_grad else []

    def backward_teacher(self, leaves: dict[int, Tensor]) -> None:
        """Run the backward of the distillation loss through the main head (only with `detach_teacher: false`).

        It comes when all offsets are compared; the main head's forward is recomputed, since its graph is freed by then.
        """
        if self.teacher is None or self.teacher.grad is None:
            return
        path = self.model.heads.chain(1)
        hidden = leaves[self.model.parent_of(path[0])]
        for offset in path:
            hidden = self.model.heads(offset, self.model.read(offset, hidden), self.context)
        self.backward(self.surrogate_loss(hidden, self.teacher))

    def surrogate_loss(self, state: Tensor, leaf: Tensor) -> Tensor:
        """Return the scalar sum(state * leaf.grad), whose gradient with respect to `state` is `leaf.grad`.

        `leaf.grad` bears the loss scale already, by which the coming backward pass multiplies once more: divide it out.
        """
        gradient = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
        scale = self.terms.objective.loss_scale
        if scale != 1:
            exact = torch.promote_types(state.dtype, torch.float32)
            state, gradient = state.to(exact), gradient.to(exact) / scale
        return (state * gradient).sum()

    def _set_teacher(self, main: Tensor) -> None:
        if self.terms.objective.section.distill is not None:
            self.teacher = main.detach().requires_grad_(self.terms.teacher_of(main).requires_grad)

    def _loss(self, offset: int, state: Tensor) -> Tensor:
        terms, state = self.terms.for_offset(offset), self.terms.scored(offset, state)
        is_compared = any(term.distillation is not None for term in terms)
        loss: Tensor = self.model.unembedding(
            [offset] * len(terms),
            [state] * len(terms),
            terms,
            balance_to=self.main_rms,
            # engines would wait for an unused input in vain
            teacher=self.terms.scored(1, self.teacher) if self.teacher is not None and is_compared else None,
            teacher_learns=self.terms.teacher_learns,
        )
        if offset == 1 and self.terms.objective.is_balanced and self.main_rms is None:
            self.main_rms = terms[0].rms()
        return loss

    @torch.no_grad()
    def _measure_main(self, leaf: Tensor) -> None:
        """Heads that read the main head go before it: their balance needs its RMS in advance."""
        self._loss(1, leaf)


def _leaf_of(state: Tensor) -> Tensor:
    return state.detach().requires_grad_(state.requires_grad)


def _all_hidden_states(terms: LossTerms) -> dict[int, Tensor]:
    """What is scored of the hidden states of the offsets that a step needs, in one graph."""
    model, batch = terms.model, terms.batch
    run = None if terms.rollout is None else terms.rollout.run_and_draft
    needed = needed_offsets(model, terms.objective)
    hiddens = model.hidden_states(
        batch.tokens, batch.documents, needed, run, starts=batch.starts, sequence=batch.sequence
    )
    return {offset: terms.scored(offset, hidden) for offset, hidden in hiddens.items()}


def bridged(model: MtpModel, batch: MicroBatch, objective: Objective, backward: Backward) -> OffsetLosses:
    """Keep all heads' hidden states, compute every chunked loss in one node, go backward once."""
    terms = LossTerms(model, batch, objective)
    hiddens = _all_hidden_states(terms)
    offsets, states, parts = [], [], []
    for offset, hidden in hiddens.items():
        for term in terms.for_offset(offset) if terms.needs_loss(offset, hidden) else []:
            offsets.append(offset)
            states.append(hidden)
            parts.append(term)
    teacher = terms.teacher_of(hiddens[1]) if terms.distillations else None
    if parts:  # else, at this step, only frozen offsets have a weight
        loss = model.unembedding(offsets, states, parts, teacher=teacher, teacher_learns=terms.teacher_learns)
        if loss.requires_grad:
            backward(loss)
    return terms.losses()


def joint(model: MtpModel, batch: MicroBatch, objective: Objective, backward: Backward) -> OffsetLosses:
    """Compute the loss as defined, on full logits of every head: the oracle of the other two."""
    section, terms = objective.section, LossTerms(model, batch, objective)
    total: Tensor | float = 0.0
    main_rms: Tensor | float = 1.0
    hiddens = _all_hidden_states(terms)
    main: Tensor | None = None
    for offset, hidden in hiddens.items():
        logits = _scored(terms, offset, _full_logits(model, offset, hidden))
        main = logits if offset == 1 and section.distill is not None else main
        if not terms.needs_loss(offset, hidden):
            continue
        targets = terms.targets(offset)
        if (learns := terms.learns_at(offset)) is not None:
            targets = torch.where(learns, targets, IGNORE)
        losses = reference.cross_entropy(logits, targets, section.label_smoothing, section.z_loss)
        factor = objective.coefficients[offset - 1]
        if objective.is_balanced:
            rms = torch.sqrt(losses.detach().square().sum() / (targets != IGNORE).sum().clamp(min=1))
            main_rms = rms if offset == 1 else main_rms
            factor = factor * main_rms / rms
        loss = losses.sum()
        if main is not None and offset > 1 and section.distill is not None:
            loss = section.distill.alpha_of(offset) * loss + _joint_distillation(terms, offset, main, logits)
        total = total + factor * loss
        terms.record(offset, logits.detach())
    if section.token_order is not None:
        total = total + _joint_token_order(model, batch, objective, hiddens[1])
    if isinstance(total, Tensor) and total.requires_grad:
        backward(total)
    return terms.losses()


def _full_logits(model: MtpModel, offset: int, hidden: Tensor) -> Tensor:
    """All logits of an offset, (P, V)."""
    logits = model.unembedding.all_logits(offset, hidden).flatten(0, 1)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _scored(terms: LossTerms, offset: int, logits: Tensor) -> Tensor:
    """Keep of all logits, (P, V), those that the offset scores, (P, V or V')."""
    vocabulary = terms.model.unembedding.vocabulary(offset)
    return logits if vocabulary is None else vocabulary.columns_of(logits)


def _joint_distillation(terms: LossTerms, offset: int, main: Tensor, logits: Tensor) -> Tensor | float:
    distillation = terms.distillation(offset)
    if distillation is None:
        return 0.0
    teacher = terms.teacher_of(main.roll(1 - offset, 0))  # wrong where rows wrap around: no teacher there
    counts, drafts = distillation.has_teacher, terms.model.unembedding.drafts
    if drafts is not None:
        counts = counts & ~drafts.lacks(teacher.argmax(1))
    losses = reference.distillation(_scored(terms, offset, teacher), logits, distillation.section) * counts
    distillation.measured_sum = losses.detach().sum()
    total = losses.sum() if distillation.learns is None else (losses * distillation.learns).sum()
    distillation.loss_sum = total.detach()
    return distillation.weight * total


def _joint_token_order(model: MtpModel, batch: MicroBatch, objective: Objective, hidden: Tensor) -> Tensor:
    section, matrix = objective.section.token_order, model.unembedding.token_order
    assert section is not None
    assert matrix is not None
    logits = matrix(model.unembedding.normalize(1, hidden)).to(objective.coefficients.dtype)
    losses = reference.token_order(logits, batch.tokens, batch.documents, section.window_size)
    return objective.token_order_coefficient * losses.sum()


BACKWARD_ORDERS = {"sequential": sequential, "bridged": bridged, "joint": joint}
