"""Law 13: marginalization is enumeration of all paths; and what is left out is what the mass says."""

import itertools

import pytest
import torch

from mtp_lightning.decode.state import DecodeState, prefill
from mtp_lightning.evaluation.marginal import BRANCH_TOKENS, laws_ahead
from tests.decode.oracles import full_logits, model_of

PREFIX, COMMITTED = [1, 2, 3, 7], 5
KINDS = ("parallel", "causal", "anticausal", "sequential", "medusa", "parallel_neox")
V = 13


def begun(kind):
    model = model_of(kind)
    session = DecodeState(model, [PREFIX], max_drafts=0, remaining=2 * BRANCH_TOKENS, seed=0)
    prefill(session)
    session.tokens[0, len(PREFIX)] = COMMITTED
    session.note_progress()
    return model, session


def enumerated(model, num_offsets):
    """Laws by whole forwards over every path, without a cache."""
    text = [*PREFIX, COMMITTED]

    def law(path):
        return full_logits(model, [*text, *path])[1][-1].softmax(-1)

    laws = [law(())]
    for length in range(1, num_offsets):
        total = torch.zeros(V, dtype=torch.float64)
        for path in itertools.product(range(V), repeat=length):
            weight = 1.0
            for index, token in enumerate(path):
                weight *= float(law(path[:index])[token])
            total += weight * law(path)
        laws.append(total)
    return laws


@pytest.mark.parametrize("kind", KINDS)
def test_over_all_paths_it_is_enumeration(kind):
    model, session = begun(kind)
    found = laws_ahead(session, 2, nucleus=1.0, most_paths=10**6)
    for law, expected in zip(found, enumerated(model, 2), strict=True):
        torch.testing.assert_close(law.probabilities, expected, rtol=1e-10, atol=1e-12)
        assert law.mass == pytest.approx(1.0)
    assert [law.num_paths for law in found] == [1, V]


def test_two_tokens_in_between_and_several_passes():
    model, session = begun("parallel")
    found = laws_ahead(session, 3, nucleus=1.0, most_paths=10**6)
    assert 2 * V**2 > BRANCH_TOKENS  # so that branches go through the model in several passes
    torch.testing.assert_close(found[2].probabilities, enumerated(model, 3)[2], rtol=1e-10, atol=1e-12)
    again = laws_ahead(session, 3, nucleus=1.0, most_paths=10**6)  # cache and text are as before
    assert torch.equal(again[2].probabilities, found[2].probabilities)


def test_a_nucleus_is_the_smallest_and_a_budget_cuts_it():
    model, session = begun("parallel")
    first = full_logits(model, [*PREFIX, COMMITTED])[1][-1].softmax(-1)
    ordered = first.sort(descending=True).values
    law = laws_ahead(session, 2, nucleus=0.8, most_paths=10**6)[1]
    assert law.mass == pytest.approx(float(ordered[: law.num_paths].sum()))
    assert float(ordered[: law.num_paths - 1].sum()) < 0.8 <= law.mass
    cut = laws_ahead(session, 2, nucleus=0.8, most_paths=2)[1]
    assert (cut.num_paths, cut.mass) == (2, pytest.approx(float(ordered[:2].sum())))
    assert float(cut.probabilities.sum()) == pytest.approx(1.0)
