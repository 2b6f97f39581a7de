"""Laws 6 and 7: speculative text is plain greedy text; accepted counts are those that training predicts."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_lightning.decode import Settings, Tree, applicable_decoders, generate
from mtp_lightning.decode.drafting import draft_blockwise, draft_chain
from mtp_lightning.decode.generation import stream
from mtp_lightning.decode.state import verify
from tests.decode.oracles import (
    DECODED_KINDS,
    LENGTH,
    PROMPTS,
    WrittenDrafts,
    begun_session,
    full_logits,
    model_of,
    plain_texts,
    settings_of,
    trained_model_of,
)
from tests.support.covering import every_pair, some_of
from tests.support.tiny import HEAD_KINDS

BEGUN = ("parallel", "medusa_replicated", "causal", "sequential", "recursive")
STOPS = range(0, 13, 3)  # kinds in turn take the even and the odd ones, with right drafts and with their own
MARGIN = 4  # tokens of the plain text kept back, so that drafts near the end can be judged


def kinds_and_rows():
    """Five rows of every third kind every day; every kind with one and five is slow, other numbers are by hand."""
    for (place, kind), num_rows in itertools.product(enumerate(DECODED_KINDS), (1, 2, 3, 4, 5)):
        others = pytest.mark.slow if num_rows in (1, 5) else pytest.mark.matrix
        yield pytest.param(kind, num_rows, marks=() if num_rows == 5 and place % 3 == 0 else others)


@pytest.mark.parametrize(("kind", "num_rows"), [*kinds_and_rows()])
def test_every_decoder_says_what_plain_greedy_says(kind, num_rows):
    model, prompts = model_of(kind), PROMPTS[:num_rows]
    expected = plain_texts(model, prompts)
    for chosen in settings_of(model, max_new_tokens=LENGTH):
        made = generate(model, prompts, chosen)
        assert made.tokens == expected, chosen.decoder
        assert made.statistics.is_consistent
        assert (made.statistics.num_draft_tokens > 0) == (chosen.decoder != "greedy")


@pytest.mark.parametrize("kind", some_of(DECODED_KINDS, one_in=3, first=2))
def test_random_heads_are_right_at_times(kind):
    """Without this, the law above would hold of decoders that never keep a draft."""
    for chosen in settings_of(model_of(kind), max_new_tokens=LENGTH)[1:]:
        assert generate(model_of(kind), PROMPTS, chosen).statistics.num_accepted_tokens > 0


@pytest.mark.parametrize(
    "kind", [kind if kind in BEGUN else pytest.param(kind, marks=pytest.mark.slow) for kind in HEAD_KINDS]
)
def test_trained_heads_say_what_plain_greedy_says(kind):
    """Trained heads are right by their own doing, and wrong at words' ends: most steps keep some drafts and not all."""
    model = trained_model_of(kind)
    expected = plain_texts(model, PROMPTS)
    for chosen in settings_of(model, max_new_tokens=LENGTH):
        made = generate(model, PROMPTS, chosen)
        assert made.tokens == expected, chosen.decoder
        if chosen.decoder != "greedy":
            assert made.statistics.is_consistent
            assert 0.2 < made.statistics.num_accepted_tokens / made.statistics.num_drafts < model.num_offsets - 1


@pytest.mark.parametrize("kind", some_of(DECODED_KINDS, one_in=3, first=1))
@given(data=st.data())
@settings(max_examples=5, deadline=None)
def test_any_drafts_give_the_plain_text(kind, data):
    model = model_of(kind)
    num_rows = data.draw(st.integers(1, len(PROMPTS)), "rows")
    num_drafts = data.draw(st.integers(1, model.num_offsets - 1), "drafts")
    new_tokens = data.draw(st.integers(1, LENGTH - MARGIN), "new tokens")
    right = st.lists(st.integers(0, num_drafts), min_size=1, max_size=5)
    pattern = data.draw(st.lists(right, min_size=num_rows, max_size=num_rows), "right drafts")
    prompts, expected = PROMPTS[:num_rows], plain_texts(model, PROMPTS[:num_rows])
    forced_drafts = WrittenDrafts(model, prompts, pattern)
    for decoder in set(applicable_decoders(model)) & {"blockwise", "chain"}:
        chosen = Settings(decoder=decoder, draft_length=num_drafts, max_new_tokens=new_tokens)
        made = generate(model, prompts, chosen, forced_drafts=forced_drafts)
        assert made.tokens == [text[:new_tokens] for text in expected]
        assert made.statistics.is_consistent
        for row, accepted in enumerate(made.statistics.accepted_by_row):
            length = len(prompts[row])
            for kept in accepted:
                assert kept == forced_drafts.num_right(row, length, num_drafts)
                length += kept + 1


@every_pair(kind=DECODED_KINDS, num_offsets=[2, 4], one_in=3)
def test_all_drafts_right_take_n_tokens_a_step(kind, num_offsets):
    model = model_of(kind, num_offsets=num_offsets)
    forced_drafts = WrittenDrafts(model, PROMPTS, [[num_offsets]] * len(PROMPTS))
    made = generate(model, PROMPTS, max_new_tokens=1 + 5 * num_offsets, forced_drafts=forced_drafts)
    assert made.statistics.accepted_by_row == [[num_offsets - 1] * 5] * len(PROMPTS)
    assert made.statistics.num_cut_tokens == 0
    assert made.statistics.mean_acceptance_length == num_offsets


@every_pair(kind=DECODED_KINDS, drafts_are=["right", "their own"], one_in=3, first=1)
def test_texts_end_at_a_stop_token_wherever_it_falls(kind, drafts_are):
    model = model_of(kind)
    forced_drafts = WrittenDrafts(model, PROMPTS, [[3], [2, 1], [0, 3], [1], [3, 2]]) if drafts_are == "right" else None
    amid_block = 0
    for stop in STOPS[(DECODED_KINDS.index(kind) + (drafts_are == "right")) % 2 :: 2]:
        expected = [text[: text.index(stop) + 1] if stop in text else text for text in plain_texts(model, PROMPTS)]
        expected = [text[: LENGTH - MARGIN] for text in expected]
        for chosen in settings_of(model, max_new_tokens=LENGTH - MARGIN, stop_tokens=[stop]):
            made = generate(model, PROMPTS, chosen, forced_drafts=forced_drafts)
            assert made.tokens == expected, chosen.decoder
            assert made.statistics.is_consistent
            amid_block += made.statistics.num_cut_tokens
    assert amid_block > 0 or drafts_are == "their own"


@pytest.mark.parametrize("kind", some_of(DECODED_KINDS, one_in=3, first=1))
def test_texts_end_at_any_length(kind):
    model = model_of(kind)
    forced_drafts = WrittenDrafts(model, PROMPTS, [[3]] * len(PROMPTS))
    for new_tokens in (1, 2, 4, 5, 7):
        expected = [text[:new_tokens] for text in plain_texts(model, PROMPTS)]
        for chosen in settings_of(model, max_new_tokens=new_tokens):
            assert generate(model, PROMPTS, chosen, forced_drafts=forced_drafts).tokens == expected


@every_pair(kind=DECODED_KINDS, attention=["window", "document"], num_offsets=[2, 3, 4], full=True, one_in=2)
def test_accepted_counts_are_those_of_a_teacher_forced_pass(kind, attention, num_offsets):
    """Law 7. A prefix of right drafts is the true text, so the pass over the true text computed the same states."""
    model = model_of(kind, num_offsets=num_offsets, attention=attention)
    texts = [[*prompt, *text] for prompt, text in zip(PROMPTS[:3], plain_texts(model, PROMPTS[:3]), strict=True)]
    choices = [
        {offset: logits.argmax(-1).tolist() for offset, logits in full_logits(model, text).items()} for text in texts
    ]
    total = 0
    for decoder in set(applicable_decoders(model)) - {"greedy", "tree"}:
        for num_drafts in range(1, num_offsets):
            made = generate(
                model, PROMPTS[:3], decoder=decoder, draft_length=num_drafts, max_new_tokens=LENGTH - num_offsets
            )
            rows = zip(PROMPTS[:3], texts, choices, made.statistics.accepted_by_row, strict=True)
            for prompt, text, chosen, accepted in rows:
                assert accepted == predicted_counts(chosen, prompt, text, num_drafts)
            total += made.statistics.num_accepted_tokens
    assert total > 0


def predicted_counts(choices, prompt, text, num_drafts):
    """Drafts that every step keeps, from the choices of every offset in one forward over the finished text."""
    length, end, counts = len(prompt), len(text) - len(choices), []
    while length + 1 < end:
        right = [choices[offset][length - 1] == text[length + offset - 1] for offset in range(2, num_drafts + 2)]
        counts.append(([*right, False]).index(False))
        length += counts[-1] + 1
    return counts


BLOCKWISE = [kind for kind in HEAD_KINDS if not model_of(kind).heads.reads_tokens]


@pytest.mark.parametrize("kind", some_of(BLOCKWISE, one_in=2))
def test_a_tree_of_first_choices_is_a_chain(kind):
    """Law 7 for trees: with one choice per head they keep what blockwise keeps; with all of them, at least that."""
    model = model_of(kind)
    chain = generate(model, PROMPTS, max_new_tokens=LENGTH, decoder="blockwise")
    path = Tree((0, 1, 2), (0, 0, 0))
    tree = generate(model, PROMPTS, max_new_tokens=LENGTH, decoder="tree", tree=path)
    assert tree.statistics.accepted_by_row == chain.statistics.accepted_by_row
    wide = Tree((*[0] * 13, *range(1, 14)), (*range(13), *[0] * 13))  # every token there is, at the first level
    full = generate(model, PROMPTS, max_new_tokens=LENGTH, decoder="tree", tree=wide)
    assert full.tokens == chain.tokens
    assert all(kept >= 1 for row in full.statistics.accepted_by_row for kept in row)


def test_adaptive_length_changes_no_text():
    for kind in ("parallel", "sequential", "causal", "medusa"):
        model = model_of(kind)
        made = generate(model, PROMPTS, max_new_tokens=LENGTH, draft_length="adaptive")
        assert made.tokens == plain_texts(model, PROMPTS)
        assert len(set(made.statistics.drafted_by_step)) > 1


@pytest.mark.parametrize("kind", ["parallel", "sequential", "recursive", "causal"])
def test_heads_catch_up_after_shorter_drafts(kind):
    """Deeper heads that sat out some steps draft from the same states as if they had not."""
    model = model_of(kind)
    draft = draft_chain if model.heads.reads_tokens else draft_blockwise
    seen = {}
    for lengths in ([3, 0, 1, 0, 2, 3], [3, 3, 3, 3, 3, 3]):
        session = begun_session(model, PROMPTS)
        for num_drafts in lengths:
            if num_drafts:
                drafts = draft(session, num_drafts, lambda scores: (scores.argmax(-1), None)).tokens
            choices = verify(session, drafts[:, :0]).argmax(-1)
            session.commit(choices, torch.zeros(len(PROMPTS), dtype=torch.long))
            session.note_progress()
        seen[tuple(lengths)] = drafts
    first, second = seen.values()
    assert torch.equal(first, second)


def test_attention_of_decoding_is_never_left_to_cudnn(monkeypatch):
    """Which plans anew for every length; see `KERNELS`."""
    asked, attend = [], torch.nn.functional.scaled_dot_product_attention

    def noting(*args, **kwargs):
        asked.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
    for step in stream(model_of("parallel"), [[1, 2, 3]], Settings(max_new_tokens=6)):
        assert step is not None
        assert torch.backends.cuda.cudnn_sdp_enabled()  # whoever reads along is left alone
    assert asked
    assert not any(asked)
