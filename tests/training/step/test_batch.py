"""A prepared batch is a pure function of the rows; ranks agree on its counts, and on when to stop, in one reduction."""

import copy

import pytest
import torch

from mtp_lightning.losses.targets import IGNORE, shifted_targets
from mtp_lightning.ranks import Ranks
from mtp_lightning.training.step.batch import prepare_batch, weights_at
from mtp_lightning.training.step.metrics import ThroughputClock
from mtp_lightning.training.step.vote import StepVote, agree_on_step
from tests.support.tiny import tiny_recipe, tiny_rows

RECIPE = tiny_recipe(batch={"global_batch_size": 5, "micro_batch_size": 2}, heads={"num_offsets": 3})


def rows(num_rows=5, seed=0):
    tokens, documents, loss_mask = tiny_rows(RECIPE, num_rows, seed)
    return {"tokens": tokens, "documents": documents, "loss_mask": loss_mask, "sources": torch.arange(num_rows)}


class TwoRanks(Ranks):
    """This process as one of two, the other having brought what is given."""

    def __init__(self, other):
        super().__init__()
        self.other, self.num_reductions = other, 0

    def sum(self, tensor):
        self.num_reductions += 1
        return tensor + self.other


def test_micro_batches_are_all_rows_in_order_with_their_targets():
    batch = rows()
    prepared = prepare_batch(batch, RECIPE, 0)
    assert [len(part.tokens) for part in prepared.micro_batches] == [2, 2, 1]
    for name, dim in (("tokens", 0), ("documents", 0), ("sources", 0), ("targets", 1)):
        expected = prepared.targets if name == "targets" else batch[name]
        assert torch.equal(torch.cat([getattr(part, name) for part in prepared.micro_batches], dim), expected)
    assert torch.equal(prepared.targets, shifted_targets(batch["tokens"], batch["documents"], 3, batch["loss_mask"]))


def test_it_is_pure():
    batch = rows()
    before = copy.deepcopy(batch)
    first, again = prepare_batch(batch, RECIPE, 1), prepare_batch(batch, RECIPE, 1)
    assert torch.equal(first.targets, again.targets)
    assert first.weights == again.weights
    assert all(torch.equal(batch[name], before[name]) for name in batch)


def test_counts_are_those_of_a_slow_count():
    batch = rows()
    prepared = prepare_batch(batch, RECIPE, 0)
    num_positions = prepared.targets.shape[2]
    assert prepared.counts.targets.tolist() == [int((of_offset != IGNORE).sum()) for of_offset in prepared.targets]
    teachers = [
        sum(int(row[position]) != IGNORE for row in of_offset for position in range(num_positions - shift))
        for shift, of_offset in enumerate(prepared.targets)
    ]
    assert prepared.counts.teachers.tolist() == [0, *teachers[1:]]
    documents = batch["documents"].tolist()
    assert prepared.counts.ordered == sum(row[t] == row[t + 1] for row in documents for t in range(num_positions))


def test_held_out_rows_weigh_every_offset_the_same_whatever_trains():
    frozen = tiny_recipe(
        heads={"num_offsets": 3}, freeze=["offsets_below_3"], objective={"weights": {"kind": "curriculum"}}
    )
    assert prepare_batch(rows(), frozen, None).weights == [1.0] * 3
    assert weights_at(frozen, 0) == [0.0, 0.0, 0.0]
    assert weights_at(frozen, frozen.run.steps - 1) == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("wants_save", [False, True])
@pytest.mark.parametrize(("own", "other", "agreed"), [(0, 0, 0), (1, 0, 1), (0, 2, 2), (2, 1, 2)])
def test_one_reduction_brings_counts_the_highest_stop_level_and_the_wish_to_save(own, other, agreed, wants_save):
    there = prepare_batch(rows(seed=1), RECIPE, 0).counts
    elsewhere = StepVote()
    elsewhere.own_level, elsewhere.own_save_due = lambda: other, lambda: wants_save
    ballot = torch.tensor(elsewhere.ballot())
    ranks = TwoRanks(torch.cat((there.targets, there.teachers, there.ordered[None], ballot)))
    here, vote = prepare_batch(rows(), RECIPE, 0).counts, StepVote()
    vote.own_level = lambda: own
    counts = agree_on_step(here, vote, ranks)
    assert ranks.num_reductions == 1
    assert (vote.agreed_level, vote.save_due) == (agreed, wants_save)
    assert counts.targets == (here.targets + there.targets).tolist()
    for name in ("targets", "teachers", "ordered"):
        assert torch.equal(getattr(counts.on_device, name), getattr(here, name) + getattr(there, name))


def test_the_throughput_clock_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = ThroughputClock(RECIPE, 2)
    now[0] += 10
    clock.pause(6)
    tokens_per_step = RECIPE.batch.global_batch_size * RECIPE.data.seq_len
    assert clock.lap(4) == 2 * tokens_per_step / 4
    now[0] += 1
    assert clock.lap(5) == tokens_per_step
