"""Law 6 for sampling: what comes out has the model's law, whatever the drafts were; by chi-squared."""

import itertools

import pytest
import torch

from mtp_lightning.decode import Settings, Tree, generate
from mtp_lightning.decode.sampling import Sampling
from tests.decode.oracles import full_logits
from tests.support.tiny import HEAD_KINDS, tiny_model, tiny_recipe

VOCABULARY, NEW_TOKENS, ROWS = 4, 4, 4000
PROMPT = [1, 2]
WIDE = Tree((0, 0, 0, 1, 1, 2, 4), (0, 1, 2, 0, 1, 0, 0))
SAMPLINGS = {
    "plain": {"temperature": 1.0},
    "hot": {"temperature": 1.7},
    "top_k": {"temperature": 1.2, "top_k": 3},
    "top_p": {"temperature": 1.2, "top_p": 0.8},
}


def small_model(kind):
    model = {"vocab_size": VOCABULARY, "initializer_range": 0.25}
    return tiny_model(tiny_recipe(heads=HEAD_KINDS[kind], model=model)).requires_grad_(requires_grad=False)


def exact_law(model, sampling):
    """Probability of every text of `NEW_TOKENS` tokens, by enumeration."""
    law = {}
    for text in itertools.product(range(VOCABULARY), repeat=NEW_TOKENS):
        scores = full_logits(model, [*PROMPT, *text])[1][len(PROMPT) - 1 :]
        each = sampling.probabilities(scores)
        law[text] = float(torch.stack([each[place, token] for place, token in enumerate(text)]).prod())
    assert sum(law.values()) == pytest.approx(1)
    return law


def deviation(texts, law):
    """Chi-squared statistic in standard deviations from its mean, rare texts merged; infinite for impossible ones."""
    counts = dict.fromkeys(law, 0)
    for text in texts:
        counts[tuple(text)] += 1
    assert not [text for text, share in law.items() if share == 0 and counts[text]]
    rare = {text for text, share in law.items() if share * len(texts) < 8}
    cells = [(counts[text], share * len(texts)) for text, share in law.items() if text not in rare]
    cells.append((sum(counts[text] for text in rare), sum(law[text] for text in rare) * len(texts)))
    statistic = sum((found - expected) ** 2 / expected for found, expected in cells if expected > 0)
    freedom = len(cells) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    ("kind", "sampling", "options"),
    [
        pytest.param("medusa", "plain", {"decoder": "greedy"}, marks=pytest.mark.slow),
        ("medusa", "plain", {"decoder": "blockwise"}),
        pytest.param("medusa", "top_p", {"decoder": "blockwise"}, marks=pytest.mark.slow),
        pytest.param("sequential", "plain", {"decoder": "chain"}, marks=pytest.mark.slow),
        pytest.param("sequential", "hot", {"decoder": "chain", "sample_drafts": True}, marks=pytest.mark.slow),
        ("sequential", "top_k", {"decoder": "chain", "sample_drafts": True}),
        pytest.param(
            "parallel",
            "top_p",
            {"decoder": "blockwise", "sample_drafts": True, "draft_length": 2},
            marks=pytest.mark.slow,
        ),
        pytest.param("causal", "top_k", {"decoder": "chain"}, marks=pytest.mark.slow),
        pytest.param("linear", "plain", {"decoder": "tree", "tree": WIDE}, marks=pytest.mark.slow),
        ("parallel", "top_p", {"decoder": "tree", "tree": WIDE}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_sampled_texts_have_the_law_of_plain_sampling(kind, sampling, options):
    model, chosen = small_model(kind), SAMPLINGS[sampling]
    made = generate(model, [PROMPT] * ROWS, max_new_tokens=NEW_TOKENS, **chosen, **options)
    assert abs(deviation(made.tokens, exact_law(model, Sampling(**chosen)))) < 5
    assert made.statistics.is_consistent
    if options["decoder"] != "greedy":
        assert 0 < made.statistics.num_accepted_tokens < made.statistics.num_draft_tokens


def test_the_statistic_sees_another_law():
    """Typical acceptance is lossy, and another temperature is another law: both stand out."""
    model = small_model("medusa")
    law = exact_law(model, Sampling(temperature=1.0))
    typical = generate(model, [PROMPT] * ROWS, max_new_tokens=NEW_TOKENS, temperature=1.0, typical=True)
    assert deviation(typical.tokens, law) > 20
    hotter = generate(model, [PROMPT] * ROWS, max_new_tokens=NEW_TOKENS, temperature=1.3)
    assert deviation(hotter.tokens, law) > 20


def test_the_seed_decides_the_text():
    model = small_model("medusa")
    settings = [Settings(temperature=1.0, seed=seed, max_new_tokens=20) for seed in (1, 1, 2)]
    first, again, other = (generate(model, [PROMPT] * 4, chosen).tokens for chosen in settings)
    assert first == again != other
