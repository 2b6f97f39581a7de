"""On-policy training: every backward order has the gradients of a plain loop over positions, which drafts as a decoder.

The loop runs each module on the given states before a position and on the position's own state, one position at a time.
"""

import pytest
import torch

from mtp_lightning.decode import generate
from mtp_lightning.decode.drafting import draft_chain
from mtp_lightning.decode.state import DecodeState, prefill
from mtp_lightning.losses import reference
from mtp_lightning.losses.distillation import teacher_positions
from mtp_lightning.losses.targets import IGNORE, shifted_targets
from mtp_lightning.model.freezing import freeze
from mtp_lightning.model.heads import HeadContext
from mtp_lightning.model.positions import document_geometry, window_geometry
from mtp_lightning.recipe.draft_vocabulary import with_draft_ids
from mtp_lightning.training.step.backward_order import accumulate_gradients
from mtp_lightning.training.step.batch import MicroBatch
from mtp_lightning.training.step.objective import Objective
from mtp_lightning.training.step.rollout import RolloutDraw
from tests.decode.oracles import LENGTH, PROMPTS, plain_texts, trained_model_of
from tests.laws.test_decoding import predicted_counts
from tests.support.covering import every_pair
from tests.support.tiny import HEAD_KINDS, NEOX, gradients_of, relative_error, tiny_model, tiny_recipe, tiny_rows

ORDERS = ("sequential", "bridged", "joint")
OBJECTIVES = {
    "plain": {},
    "smooth": {"label_smoothing": 0.1, "z_loss": 0.01},
    "distilled": {"distill": {"alpha": [0.6], "beta": [0.9], "top_k": 5}},
    "tv": {"distill": {"divergence": "tv", "detach_teacher": False}},
}


def rolled_recipe(kind="sequential", *, objective=None, order="joint", num_offsets=4, **sections):
    heads = HEAD_KINDS[kind] | {"num_offsets": num_offsets} | sections.pop("heads", {})
    fields = {"backward_order": order, "chunk_mib": 5 * 13 * 8 / 2**20, "rollout": {}} | (objective or {})
    return tiny_recipe(heads=heads, objective=fields, **sections)


MODELS = {"plain": {}, "tied": {"tie_word_embeddings": True}, "neox": NEOX}


class PlainLoop:
    """States, drafts and losses of one row at a time, one position at a time, in one graph of autograd."""

    def __init__(self, model, recipe, rows, step=0):
        self.model, self.recipe = model, recipe
        self.tokens, self.documents, mask = rows
        self.targets = shifted_targets(self.tokens, self.documents, model.num_offsets, mask)
        draw = RolloutDraw.at(recipe, step)
        self.drawn = draw.positions(self.tokens, self.targets.shape[2])
        self.replaces = draw.replaces
        self.given = model.hidden_states(self.tokens, self.documents)

    def own(self, row, position):
        """States of the offsets at a position that reads its own drafts, and the drafts."""
        model, states, drafts = self.model, {}, {}
        embedded = model.embed(self.tokens[row, None])
        past = slice(0, position + 1)
        if model.attends_in_document:
            geometry = document_geometry(self.documents[row, None, past], model.section, like=embedded)
        else:
            geometry = window_geometry(position + 1, model.section, like=embedded)
        for k in model.heads.offsets:
            states[k] = self.given[k][row, position]
            if k > 2:
                read = torch.cat((self.given[k - 1][row, :position], states[k - 1][None]))[None]
                tokens = self.tokens[row, k - 1 : k + position].clone()
                tokens[-1] = drafts[k - 1]
                between = model.embed_drafts(tokens[None])
                states[k] = model.heads(k, model.read(k, read), HeadContext(geometry, embedded, between))[0, -1]
            drafts[k] = int(model.unembedding.logits(k, states[k]).argmax())
        return states, drafts

    def run(self):
        """Scores (B, T, V) and choices of every offset, and where it learns."""
        num_rows, num_positions = self.drawn.shape
        states, learns = (
            {k: list(given.unbind(0)) for k, given in self.given.items()},
            torch.ones_like(self.targets) > 0,
        )
        for row in range(num_rows):
            each = {k: list(states[k][row].unbind(0)) for k in states}
            for position in range(num_positions):
                if self.drawn[row, position]:
                    own, drafts = self.own(row, position)
                    for k in range(3, self.model.num_offsets + 1):
                        right = all(drafts[j] == self.tokens[row, position + j] for j in range(2, k))
                        if self.replaces:
                            each[k][position] = own[k]
                        elif not right:
                            learns[k - 1, row, position] = False
            for k in states:
                states[k][row] = torch.stack(each[k])
        logits = {k: self.model.unembedding.logits(k, torch.stack(kept)) for k, kept in states.items()}
        return logits, learns

    def loss(self):
        logits, learns = self.run()
        section, total = self.recipe.objective, 0.0
        has_teacher = teacher_positions(self.targets)
        for k, scores in logits.items():
            valid = self.targets[k - 1]
            targets = torch.where(learns[k - 1], valid, IGNORE).flatten()
            flat = scores.flatten(0, 1)
            loss = reference.cross_entropy(flat, targets, section.label_smoothing, section.z_loss).sum()
            loss = loss / (valid != IGNORE).sum()
            if k > 1 and (distill := section.distill) is not None:
                main = logits[1].detach() if distill.detach_teacher else logits[1]
                there = main.roll(1 - k, 1).flatten(0, 1)
                own = reference.distillation(there, flat, distill) * (has_teacher[k - 1] & learns[k - 1]).flatten()
                own = own.sum() / has_teacher[k - 1].sum()
                loss = distill.alpha_of(k) * loss + distill.beta_of(k) * own
            total = total + loss
        return total


@every_pair(
    kind=["sequential", "sequential_pre_norm", "recursive"],
    order=ORDERS,
    objective=OBJECTIVES,
    where=["all", "reached"],
    probability=[1.0, 0.5],
    attention=["window", "document"],
    model=MODELS,
    num_offsets=[3, 5],
    isolated=[False, True],
    rows_together=[1, 2],
)
def test_gradients_are_those_of_a_plain_loop(
    kind, order, objective, where, probability, attention, model, num_offsets, isolated, rows_together
):
    recipe = rolled_recipe(
        kind,
        order=order,
        num_offsets=num_offsets,
        objective=OBJECTIVES[objective] | {"rollout": {"probability": probability, "where": where}},
        heads={"detach_trunk": isolated},
        data={"document_mask": attention == "document"},
        model=MODELS[model],
        batch={"global_batch_size": 2, "micro_batch_size": rows_together},
    )
    network, rows = tiny_model(recipe), tiny_rows(recipe, 2)
    losses, found = gradients_of(network, recipe, rows, step=3)
    network.zero_grad()
    loop = PlainLoop(network, recipe, rows, step=3)
    loop.loss().backward()
    errors = {name: relative_error(found[name], p.grad) for name, p in network.named_parameters()}
    assert max(errors.values()) < 1e-10, errors
    chosen = torch.cat([part.predictions for part in losses], 1)
    logits, _ = loop.run()
    for k, scores in logits.items():
        assert torch.equal(chosen[k - 1], scores.argmax(-1))


@pytest.mark.parametrize("objective", ["plain", "distilled"])
@pytest.mark.parametrize("kind", ["sequential", "recursive"])
def test_drafts_of_a_draft_vocabulary_are_read_as_ids_of_the_whole(kind, objective):
    """Every order has the same gradients, and reads what a vocabulary of V would choose among the ids."""
    ids, kept = [0, 2, 3, 5, 8, 11, 12], {}
    for order in ORDERS:
        further = OBJECTIVES[objective] | {"rollout": {"probability": 1.0}}
        recipe = rolled_recipe(kind, order=order, objective=further, heads={"draft_vocabulary": len(ids)})
        recipe = with_draft_ids(recipe, ids)
        network = tiny_model(recipe)
        losses, kept[order] = gradients_of(network, recipe, tiny_rows(recipe, 2))
        assert all(set(part.predictions[1:].flatten().tolist()) <= set(ids) for part in losses)
        assert all(part.off_text[2:].sum() > 0 for part in losses)
    for order in ("sequential", "bridged"):
        assert max(relative_error(kept[order][name], wanted) for name, wanted in kept["joint"].items()) < 1e-10


def predictions_of(model, recipe, texts):
    """First choices of every offset at every position of rows of equal length, as far as they have n tokens more."""
    tokens = torch.tensor(texts)
    documents = torch.zeros_like(tokens)
    targets = shifted_targets(tokens, documents, model.num_offsets)
    counts = (targets != IGNORE).sum((1, 2)).double()
    objective = Objective(
        recipe.objective, [1.0] * len(targets), counts, predicts=True, rollout=RolloutDraw.at(recipe, 0)
    )
    batch = MicroBatch(tokens, documents, targets)
    return accumulate_gradients(model, batch, objective, torch.Tensor.backward)


@pytest.mark.parametrize("kind", ["sequential", "recursive"])
def test_drafts_are_those_of_the_decoder(kind):
    """At every prefix of a text, whatever follows it: all drafts up to the one after the first that is wrong."""
    model, recipe = trained_model_of(kind), rolled_recipe(kind)
    generator = torch.Generator().manual_seed(5)
    text = [*PROMPTS[2], *plain_texts(model, PROMPTS)[2]]
    text = [token if torch.rand((), generator=generator) < 0.8 else 12 - token for token in text]
    made = predictions_of(model, recipe, [text]).predictions[1:, 0].T.tolist()  # (T, K)
    compared, wrong_before = 0, 0
    for position, drafts in enumerate(made):
        session = DecodeState(model, [text[: position + 1]], max_drafts=3, remaining=9, seed=0)
        prefill(session)
        session.tokens[0, position + 1] = text[position + 1]
        session.note_progress()
        decoded = draft_chain(session, 3, lambda scores: (scores.argmax(-1), None)).tokens[0].tolist()
        right = [draft == token for draft, token in zip(decoded, text[position + 2 :], strict=False)]
        exact = min(3, [*right, False].index(False) + 2)
        assert drafts[:exact] == decoded[:exact]
        compared, wrong_before = compared + exact, wrong_before + (exact >= 2 and not right[0])
    assert compared > 60
    assert wrong_before > 5


@pytest.mark.parametrize("kind", ["sequential", "recursive"])
def test_the_decoder_keeps_what_a_rollout_predicts(kind):
    """Law 7, with drafts read in place of the text: as with the text, for a prefix of right drafts is the text."""
    model, recipe = trained_model_of(kind), rolled_recipe(kind)
    prompt = PROMPTS[2]
    text = [*prompt, *plain_texts(model, PROMPTS)[2]]
    chosen = {k: choice[0].tolist() for k, choice in enumerate(predictions_of(model, recipe, [text]).predictions, 1)}
    made = generate(model, [prompt], decoder="chain", draft_length=3, max_new_tokens=LENGTH - 4)
    counts = predicted_counts(chosen, prompt, text[: len(chosen[1]) + 4], 3)
    assert counts == made.statistics.accepted_by_row[0][: len(counts)]
    assert len(counts) > 3
    assert 0 < sum(counts) < 3 * len(counts)


@pytest.mark.parametrize("order", ORDERS)
def test_probability_0_changes_no_bit(order):
    rows = None
    results = []
    for rollout in (None, {"probability": 0.0}, {"warmup_steps": 5}):
        recipe = rolled_recipe(order=order, objective={"rollout": rollout})
        rows = rows or tiny_rows(recipe, 2)
        results.append(gradients_of(tiny_model(recipe), recipe, rows)[1])
    first, *others = results
    for other in others:
        assert all(torch.equal(other[name], gradient) for name, gradient in first.items())


def test_draws_depend_on_seed_step_and_row_alone():
    recipe = rolled_recipe(objective={"rollout": {"probability": 0.3}}, data={"seq_len": 500})
    tokens, _, _ = tiny_rows(recipe, 40)
    draw = RolloutDraw.at(recipe, 7)
    drawn = draw.positions(tokens, 500)
    assert torch.equal(torch.cat([draw.positions(row[None], 500) for row in tokens]), drawn)
    assert torch.equal(draw.positions(tokens.flip(0), 500), drawn.flip(0))
    assert drawn.float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert drawn.float().mean(0).std() < 0.1  # one share at all positions
    others = [RolloutDraw.at(recipe, 8), RolloutDraw(recipe.run.seed + 1, 7, 0.3, replaces=True)]
    for other in others:
        both = (other.positions(tokens, 500) & drawn).float().mean().item()
        assert both == pytest.approx(0.09, abs=0.01)  # independent
    following = (drawn[:, 1:] & drawn[:, :-1]).float().mean().item()
    assert following == pytest.approx(0.09, abs=0.01)


@pytest.mark.parametrize("order", ["sequential", "bridged"])
def test_nothing_of_another_document_reaches_a_loss(order):
    recipe = rolled_recipe(order=order, data={"seq_len": 9, "document_mask": True})
    model, (tokens, documents, _) = tiny_model(recipe), tiny_rows(recipe, 1)
    documents = torch.zeros_like(documents)
    documents[:, 6:] = 1
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 13
    own = [gradients_of(model, recipe, (rows, documents, documents == 0))[1] for rows in (tokens, changed)]
    for name, gradient in own[0].items():
        assert torch.equal(gradient, own[1][name]), name


def test_off_text_counts_targets_behind_a_wrong_draft():
    batch = {"global_batch_size": 8, "micro_batch_size": 8}
    recipe = rolled_recipe(objective={"rollout": {"where": "reached"}}, order="sequential", batch=batch)
    model, rows = tiny_model(recipe), tiny_rows(recipe, 8)
    (losses,), _ = gradients_of(model, recipe, rows)
    tokens, valid = rows[0], shifted_targets(*rows[:2], 4, rows[2]) != IGNORE
    right = torch.stack([losses.predictions[k - 1] == tokens[:, k : k + 9] for k in (2, 3)]).cumprod(0) > 0
    expected = [(valid[k - 1] & ~right[k - 3]).sum() for k in (3, 4)]
    assert losses.off_text[2:].tolist() == [float(number) for number in expected]
    assert 0 < expected[0] < valid[2].sum()


@pytest.mark.parametrize("where", ["all", "reached"])
def test_a_frozen_offset_drafts_too(where):
    """Without a loss of its own, and whatever is logged."""
    results = []
    for order, predicts in (("joint", True), ("sequential", False), ("bridged", False)):
        recipe = rolled_recipe(order=order, objective={"rollout": {"where": where}}, freeze=["offsets_below_3"])
        model, (tokens, documents, _) = tiny_model(recipe), tiny_rows(recipe, 2)
        freeze(model, recipe)
        targets = shifted_targets(tokens, documents, 4)
        counts, draw = (targets != IGNORE).sum((1, 2)).double(), RolloutDraw.at(recipe, 0)
        objective = Objective(recipe.objective, [0, 0, 1, 1], counts, predicts=predicts, rollout=draw)
        losses = accumulate_gradients(model, MicroBatch(tokens, documents, targets), objective, torch.Tensor.backward)
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert losses.computed == ((1, 2, 3, 4) if predicts else (3, 4))
    expected, *others = results
    assert "heads.blocks.1.eh_proj.weight" in expected
    for found in others:
        assert found.keys() == expected.keys()
        assert max(relative_error(found[name], expected[name]) for name in expected) < 1e-10
