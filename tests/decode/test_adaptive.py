"""As many drafts as pay: useless heads cost next to nothing, perfect ones draft in full, and a change is noticed."""

import functools

import pytest
import torch

from mtp_lightning.bench.decoding.rounds import WrittenDrafts
from mtp_lightning.decode import Settings, generate
from mtp_lightning.decode.adaptive import FIRST_WAIT, LONGEST_WAIT, AdaptiveLength, step_costs
from tests.decode.oracles import model_of

PROMPT = [1, 2, 3]
NUM_TOKENS = 240
ADAPTIVE = Settings(max_new_tokens=NUM_TOKENS, draft_length="adaptive")


@functools.cache
def plain_of(kind):
    """A plain text, longer than is asked for: the last drafts reach beyond its end."""
    return generate(model_of(kind), [PROMPT], max_new_tokens=NUM_TOKENS + 4, decoder="greedy")


class Drafts:
    """Drafts that are right from a length on, and wrong before."""

    def __init__(self, kind, *, right_from):
        self.right = WrittenDrafts([PROMPT], plain_of(kind), torch.device("cpu"))
        self.right_from = right_from

    def __call__(self, lengths, num_drafts):
        wrong = (lengths < self.right_from).long()[:, None]
        return (self.right(lengths, num_drafts) + wrong) % 13


def widths_of(kind, right_from):
    """Tokens fed in every verifying forward; the text must be the plain one."""
    made = generate(model_of(kind), [PROMPT], ADAPTIVE, forced_drafts=Drafts(kind, right_from=right_from))
    assert made.tokens[0] == plain_of(kind).tokens[0][:NUM_TOKENS]
    return [1 + num_drafts for num_drafts in made.statistics.drafted_by_step]


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_useless_heads_are_hardly_asked(kind):
    widths = widths_of(kind, right_from=10**9)
    assert len(widths) + sum(width > 1 for width in widths) <= 1.1 * NUM_TOKENS  # forwards of the trunk and of heads
    assert sum(widths) <= 1.2 * NUM_TOKENS
    trials = [index for index, width in enumerate(widths) if width > 1 and index > FIRST_WAIT]
    assert trials  # looked again


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_perfect_heads_draft_in_full(kind):
    assert {*widths_of(kind, right_from=0)} == {4}


def test_heads_that_become_good_are_noticed():
    widths = widths_of("parallel", right_from=100)
    assert widths[-1] == 4
    assert sum(width == 1 for width in widths) < 0.7 * NUM_TOKENS


def test_half_right_heads_are_asked_as_often_as_pays():
    """The first draft is always right, the others never."""
    adaptive = AdaptiveLength([1.0, 1.3, 1.6, 1.9])
    chosen = []
    for _ in range(200):
        chosen.append(adaptive.choose())
        adaptive.observe(chosen[-1], [min(chosen[-1], 1)])
    assert chosen[0] == 3
    assert max(chosen[20:]) <= 2
    assert sum(length == 1 for length in chosen) > 180
    assert adaptive.wait <= LONGEST_WAIT


@pytest.mark.parametrize("kind", ["parallel", "sequential", "causal", "recursive", "medusa"])
def test_every_further_draft_costs_more(kind):
    costs = step_costs(model_of(kind), 3)
    assert len(costs) == 4
    assert sorted(costs) == costs
    assert costs[0] < costs[3] < 6 * costs[0]


def test_the_larger_the_batch_the_less_is_drafted():
    costs = [step_costs(model_of("parallel"), 3, num_rows) for num_rows in (1, 4, 16, 64)]
    assert len({costs_of[0] for costs_of in costs}) == 1  # in forwards without drafts of the same batch
    assert [costs_of[1] for costs_of in costs] == sorted({costs_of[1] for costs_of in costs})
    lengths = []
    for costs_of in costs:
        adaptive = AdaptiveLength([1 + (cost - costs_of[0]) / costs_of[0] for cost in costs_of])
        adaptive.reached, adaptive.kept = [100.0] * 3, [75.0] * 3
        lengths.append(adaptive.best())
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]
