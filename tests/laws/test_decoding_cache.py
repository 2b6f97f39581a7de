"""Law 8: cached attention = full attention, after any history of accepted and rejected drafts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_lightning.decode.drafting import draft_blockwise, draft_chain
from mtp_lightning.decode.state import keep_path, verify, verify_tree
from mtp_lightning.decode.tree import TreeTables
from tests.decode.oracles import DECODED_KINDS, PROMPTS, TREE, begun_session, full_logits, model_of
from tests.support.covering import every_pair, some_of

EXACT = {"rtol": 1e-9, "atol": 1e-9}


@every_pair(kind=DECODED_KINDS, attention=["window", "document"], one_in=2)
@given(data=st.data())
@settings(max_examples=3, deadline=None)
def test_scores_after_any_history_are_those_of_a_full_pass(kind, attention, data):
    model = model_of(kind, attention=attention)
    num_rows = data.draw(st.integers(1, 3), "rows")
    session = begun_session(model, PROMPTS[-num_rows:])
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    for _ in range(data.draw(st.integers(1, 4), "steps")):
        num_drafts = data.draw(st.integers(0, 3), "drafts")
        check_heads(session, num_drafts)
        drafts = torch.randint(model.section.vocab_size, (num_rows, num_drafts), generator=generator)
        scores = verify(session, drafts)
        for row in range(num_rows):
            length = int(session.lengths[row])
            text = [*session.tokens[row, : length + 1].tolist(), *drafts[row].tolist()]
            torch.testing.assert_close(scores[row], full_logits(model, text)[1][length:], **EXACT)
        accepted = torch.tensor([data.draw(st.integers(0, num_drafts), "accepted") for _ in range(num_rows)])
        following = torch.randint(model.section.vocab_size, (num_rows, 1), generator=generator)
        block = torch.cat((drafts, following), dim=1).scatter(1, accepted[:, None], following)
        session.commit(block, accepted)
        session.note_progress()
    check_slots(session)


def check_heads(session, num_drafts):
    """Compare what the heads draft from with a full pass over the committed text and the drafts so far."""
    if num_drafts == 0:
        return
    model, seen = session.model, []
    draft = draft_chain if model.heads.reads_tokens else draft_blockwise

    def choose(scores):
        seen.append(scores)
        return scores.argmax(-1), None

    drafts = draft(session, num_drafts, choose).tokens
    scores = torch.stack(seen, 1) if model.heads.reads_tokens else seen[0]  # (B, K, V)
    for row, length in enumerate(session.lengths.tolist()):
        text = [*session.tokens[row, : length + 1].tolist(), *drafts[row].tolist()]
        # Rows end at the last position that the trunk has computed; what follows is read only as tokens in between.
        full = full_logits_at(model, text, length)
        for place in range(num_drafts):
            torch.testing.assert_close(scores[row, place], full[place + 2], **EXACT)


def full_logits_at(model, text, num_positions):
    padded = torch.tensor([[*text, *[0] * model.num_offsets][: num_positions + model.num_offsets]])
    states = model.hidden_states(padded, torch.zeros_like(padded))
    return {offset: model.unembedding.logits(offset, state)[0, -1] for offset, state in states.items()}


def check_slots(session):
    """Compare keys and values of committed positions with those of a fresh reading of the committed text."""
    lengths = session.lengths.tolist()
    committed = [session.tokens[row, :length].tolist() for row, length in enumerate(lengths)]
    fresh = begun_session(session.model, committed)
    on_path = [
        (offset, keys, values) for offset, keys, values in session.cache.stored() if offset in (0, *session.path)
    ]
    again = [(offset, keys, values) for offset, keys, values in fresh.cache.stored() if offset in (0, *session.path)]
    assert len(on_path) == len(again) > 0
    for (_, *kept), (_, *read) in zip(on_path, again, strict=True):
        for mine, theirs in zip(kept, read, strict=True):
            for row, length in enumerate(lengths):
                torch.testing.assert_close(mine[row, :, :length], theirs[row, :, :length], **EXACT)


TREE_KINDS = ["parallel", "parallel_two_layers", "linear", "causal", "anticausal", "medusa"]


@pytest.mark.parametrize("kind", some_of(TREE_KINDS, one_in=2, first=1))
@given(seed=st.integers(0, 999), choices=st.lists(st.integers(0, 9), min_size=3, max_size=3))
@settings(max_examples=3, deadline=None)
def test_tree_nodes_see_their_ancestors_alone(kind, seed, choices):
    model = model_of(kind)
    session, tables = begun_session(model, PROMPTS[:3]), TreeTables(TREE, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for choice in choices:
        nodes = torch.randint(model.section.vocab_size, (3, TREE.num_drafts + 1), generator=generator)
        nodes[:, 0] = session.tokens.gather(1, session.lengths[:, None])[:, 0]
        scores, states = verify_tree(session, nodes, tables.depths, tables.ancestry)
        for row, length in enumerate(session.lengths.tolist()):
            for node, path in enumerate(tables.paths.tolist()):
                depth = int(tables.depths[node])
                text = session.tokens[row, :length].tolist() + nodes[row, path[: depth + 1]].tolist()
                if node % 4 == choice % 4:
                    torch.testing.assert_close(scores[row, node], full_logits(model, text)[1][-1], **EXACT)
        kept = torch.tensor([choice, 0, (choice * 7) % 10])
        path, accepted = tables.paths[kept], tables.depths[kept]
        keep_path(session, states, path)
        block = nodes.gather(1, path).roll(-1, 1).scatter(1, accepted[:, None], nodes[:, -1:])
        session.commit(block, accepted)
        session.note_progress()
        check_heads(session, 3)
    check_slots(session)
