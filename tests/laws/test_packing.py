"""With attention confined to the document, a packed document is computed as if it stood alone."""

import pytest
import torch

from mtp_lightning.model.positions import positions_in_document
from tests.support.tiny import HEAD_KINDS, tiny_model, tiny_recipe


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_a_packed_document_is_computed_as_if_alone(kind):
    recipe = tiny_recipe(heads=HEAD_KINDS[kind], data={"document_mask": True, "seq_len": 12})
    model = tiny_model(recipe)
    n = recipe.heads.num_offsets
    tokens = torch.randint(13, (1, 12 + n), generator=torch.Generator().manual_seed(3))
    documents = torch.tensor([[0] * 5 + [1] * (7 + n)])
    packed = model.hidden_states(tokens, documents)
    alone = model.hidden_states(tokens[:, 5:], documents[:, 5:])
    for offset in packed:
        torch.testing.assert_close(packed[offset][:, 5:], alone[offset], rtol=1e-10, atol=1e-12)
    window = tiny_model(recipe.model_copy(update={"data": recipe.data.model_copy(update={"document_mask": False})}))
    difference = (window.hidden_states(tokens, documents)[1][:, 5:] - alone[1]).abs().max()
    assert difference > 1e-3


def test_positions_restart_at_every_document():
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [5, 5, 5, 5, 5, 5]])
    assert positions_in_document(documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_no_state_looks_ahead(kind):
    """Changing the token at t+k and beyond never changes the state from which offset k is predicted at t."""
    recipe = tiny_recipe(heads=HEAD_KINDS[kind])
    model = tiny_model(recipe)
    n, T = recipe.heads.num_offsets, recipe.data.seq_len
    tokens = torch.randint(13, (1, T + n), generator=torch.Generator().manual_seed(4))
    documents = torch.zeros_like(tokens)
    before = model.hidden_states(tokens, documents)
    for position in (2, 5):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 1) % 13
        after = model.hidden_states(changed, documents)
        for offset, state in before.items():
            seen = max(0, position - offset + 1) if model.heads.reads_tokens else position
            torch.testing.assert_close(after[offset][:, :seen], state[:, :seen], rtol=1e-12, atol=1e-14)
            assert (after[offset][:, seen] - state[:, seen]).abs().max() > 1e-6
