"""Rules of acceptance at their edges, and sampling's filters against their definitions."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtp_lightning.decode.sampling import Sampling, draw, race
from mtp_lightning.decode.tree import TreeTables, accept_tree_greedy, build_tree
from mtp_lightning.decode.verify import accept_greedy, accept_point_mass, accept_typical, rejection_sample

ROWS, V = 2000, 5
WARM = Sampling(temperature=1.0)


def scores_of(probabilities, rows=ROWS):
    """Scores of a (K+1, V) law, for many rows."""
    return torch.tensor(probabilities, dtype=torch.float64).log().expand(rows, -1, -1)


def generator():
    return torch.Generator().manual_seed(3)


def test_greedy_keeps_the_longest_run_of_first_choices():
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3, 4]] * 5), V).double()
    drafts = torch.tensor([[1, 2, 3], [1, 2, 0], [1, 0, 3], [0, 2, 3], [0, 0, 0]])
    accepted, block = accept_greedy(logits, drafts)
    assert accepted.tolist() == [3, 2, 1, 0, 0]
    assert block.tolist() == [[1, 2, 3, 4]] * 5


def test_certain_drafts_are_always_kept_and_impossible_ones_never():
    law = [[0, 1.0, 0, 0, 0], [0, 0, 0.5, 0.5, 0], [0.2] * 5]
    drafts = torch.tensor([[1, 0]]).expand(ROWS, -1)
    accepted, block = accept_point_mass(scores_of(law), drafts, WARM, generator())
    assert accepted.unique().tolist() == [1]
    assert block[:, 0].unique().tolist() == [1]
    assert block[:, 1].unique().tolist() == [2, 3]


def test_drafts_drawn_from_the_model_itself_are_all_kept():
    law = torch.rand(2, V, generator=generator(), dtype=torch.float64)
    law = (law / law.sum(1, keepdim=True)).expand(ROWS, -1, -1)
    drafts = draw(law, generator())
    scores = torch.cat((law, law[:, :1]), dim=1).log()
    accepted, _ = rejection_sample(scores, drafts, WARM.probabilities(scores[:, :2]), WARM, generator())
    assert accepted.unique().tolist() == [2]


def test_drafts_of_disjoint_support_are_all_rejected_and_the_model_speaks():
    q = torch.tensor([[0.5, 0.5, 0, 0, 0]], dtype=torch.float64).expand(ROWS, 1, -1)
    scores = scores_of([[0, 0, 0.25, 0.25, 0.5], [0.2] * 5])
    accepted, block = rejection_sample(scores, draw(q, generator()), q, WARM, generator())
    assert accepted.unique().tolist() == [0]
    shares = torch.bincount(block[:, 0], minlength=V) / ROWS
    torch.testing.assert_close(shares, torch.tensor([0, 0, 0.25, 0.25, 0.5]), atol=0.05, rtol=0)


def test_typical_acceptance_follows_its_threshold():
    law = [[0.5, 0.3, 0.1, 0.06, 0.04], [0.2] * 5]
    entropy = -sum(p * torch.tensor(p).log() for p in law[0])
    for epsilon, delta in ((0.09, 0.3), (0.05, 0.3), (0.9, 0.3), (0.9, 0.1)):
        threshold = min(epsilon, delta * float((-entropy).exp()))
        for token, share in enumerate(law[0]):
            drafts = torch.tensor([[token]])
            limits = {"epsilon": epsilon, "delta": delta}
            accepted, _ = accept_typical(scores_of(law, 1), drafts, WARM, generator(), **limits)
            assert accepted.item() == int(share > threshold)


@given(
    scores=st.lists(st.integers(-12, 12).map(lambda third: third / 3), min_size=2, max_size=8, unique=True),
    top_k=st.integers(1, 9) | st.none(),
    top_p=st.floats(0.05, 1.0) | st.none(),
    temperature=st.floats(0.3, 3.0),
)
def test_filters_are_their_definitions(scores, top_k, top_p, temperature):
    found = Sampling(temperature=temperature, top_k=top_k, top_p=top_p).probabilities(torch.tensor(scores).double())
    weights = (torch.tensor(scores).double() / temperature).exp()
    kept = sorted(range(len(scores)), key=lambda token: -scores[token])[: top_k or len(scores)]
    law = {token: float(weights[token] / weights[kept].sum()) for token in kept}
    if top_p is not None:
        held, nucleus = 0.0, []
        for token in kept:
            if held >= top_p:
                break
            nucleus.append(token)
            held += law[token]
        law = {token: law[token] / held for token in nucleus}
    expected = torch.tensor([law.get(token, 0.0) for token in range(len(scores))]).double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@given(seed=st.integers(0, 10_000))
def test_tree_keeps_the_longest_right_path(seed):
    source = torch.Generator().manual_seed(seed)
    accuracies = torch.rand(3, 3, generator=source).sort(dim=1, descending=True).values.tolist()
    tree = build_tree(accuracies, int(torch.randint(1, 15, (), generator=source)))
    tables = TreeTables(tree, torch.device("cpu"))
    head_scores, logits = torch.randn(4, 3, 3, generator=source), torch.randn(4, 15, 3, generator=source)
    nodes = torch.nn.functional.pad(tables.fill(head_scores), (1, 0))  # (B, T)
    verdict, path = accept_tree_greedy(logits[:, : nodes.shape[1]], nodes, tables)
    for row in range(4):
        choice, at, kept = logits[row].argmax(-1).tolist(), 0, []
        while True:
            below = [i + 1 for i, parent in enumerate(tree.parents) if parent == at and nodes[row, i + 1] == choice[at]]
            if not below:
                break
            (at,) = below
            kept.append(choice[tree.parents[at - 1]])
        assert verdict.accepted[row] == len(kept)
        assert verdict.block[row, : len(kept) + 1].tolist() == [*kept, choice[at]]
        assert path[row, len(kept)] == at


def test_tree_grows_where_most_is_expected():
    accuracies = [[0.6, 0.2, 0.1], [0.5, 0.3], [0.4]]
    chances = []
    for size in range(1, 12):
        tree = build_tree(accuracies, size)
        share = [1.0]
        for parent, rank, depth in zip(tree.parents, tree.ranks, tree.depths[1:], strict=True):
            share.append(share[parent] * accuracies[depth - 1][rank])
        chances.append(share[1:])
    assert all(later[:-1] == pytest.approx(earlier) for earlier, later in pairwise(chances))
    assert chances[-1] == sorted(chances[-1], reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gpu_draws_the_tokens_that_multinomial_draws(dtype):
    """Without its checks, for which the host would wait."""
    weights = torch.rand(3, 7, 500, generator=generator(), dtype=dtype)
    weights[..., ::3] = 0
    assert torch.equal(race(weights, generator()), draw(weights, generator()))
