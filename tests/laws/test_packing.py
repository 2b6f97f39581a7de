"""With attention confined to the document, a packed document is computed as if it stood alone."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from mtp_lightning.data.loading.datamodule import document_starts
from mtp_lightning.model import layers
from mtp_lightning.model.positions import positions_in_document
from tests.support.covering import every_pair
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


def attention_of_each(query, key, value, bounds, bounds_k, most, most_k, *, window_size, enable_gqa=False):
    """As the kernel for GPUs is described: documents end to end, (P, H, W), causal inside each."""
    assert bounds is bounds_k
    assert (most, most_k, window_size, bounds.dtype) == (most_k, most, (-1, 0), torch.int32)
    mixed = torch.empty_like(query)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        assert end - start <= most
        part = (states[start:end].transpose(0, 1)[None] for states in (query, key, value))
        mixed[start:end] = scaled_dot_product_attention(*part, is_causal=True, enable_gqa=enable_gqa)[0].transpose(0, 1)
    assert bounds[0] == 0
    assert bounds[-1] == len(query)
    return mixed


@every_pair(kind=HEAD_KINDS, kv_heads=[2, 1])
def test_documents_attended_to_one_by_one_are_as_under_the_mask(kind, kv_heads, monkeypatch):
    monkeypatch.setattr(layers, "varlen_attn", attention_of_each)
    model = {"num_attention_heads": 2, "num_key_value_heads": kv_heads}
    recipe = tiny_recipe(heads=HEAD_KINDS[kind], model=model, data={"document_mask": True, "seq_len": 12})
    n = recipe.heads.num_offsets
    tokens = torch.randint(13, (3, 12 + n), generator=torch.Generator().manual_seed(3))
    documents = torch.tensor([[0] * 5 + [1] * (7 + n), [4] * (12 + n), [0, 1, 1, 2, 2, 2, 2, 3, 4, 5, 5, 6] + [6] * n])
    found = []
    for starts in (None, document_starts(documents[:, :12])):
        model = tiny_model(recipe)
        states = model.hidden_states(tokens, documents, starts=starts)
        torch.stack([state.square().sum() for state in states.values()]).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append({**{str(offset): state for offset, state in states.items()}, **gradients})
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


def test_documents_begin_where_their_numbers_change():
    documents = torch.tensor([[0, 0, 0, 1, 1, 2], [5, 5, 5, 5, 5, 5]])
    assert document_starts(documents).tolist() == [[0, 3, 5], [0, 6, 6]]


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
