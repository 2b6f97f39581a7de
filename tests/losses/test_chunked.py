"""The chunked loss alone: against the definition, with any incoming scale, and with parts frozen."""

import itertools
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_lightning.losses import reference
from mtp_lightning.losses.chunked import Term, chunk_rows, chunked_loss
from mtp_lightning.losses.row_losses import CrossEntropy, TokenOrder
from mtp_lightning.losses.targets import IGNORE


def tensors(num_rows=11, width=5, vocab_size=7):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, width, generator=generator, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(vocab_size, width, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(vocab_size, (num_rows,), generator=generator)
    targets[::3] = IGNORE
    return hidden, matrix, targets


def lean(hidden, matrix, targets, *, chunk_bytes, smoothing=0.0, z_loss=0.0, coefficient=0.5):
    score = CrossEntropy(targets, smoothing=smoothing, z_loss=z_loss, predicts=True)
    term = Term(0, score, torch.tensor(coefficient, dtype=torch.float64))
    return chunked_loss([hidden], {0: matrix}, [term], chunk_bytes=chunk_bytes), score, term


@given(
    chunk_bytes=st.integers(1, 700),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    z_loss=st.sampled_from([0.0, 0.1]),
    scale=st.sampled_from([1.0, 0.25, -3.0]),
)
@settings(max_examples=60, deadline=None)
def test_chunked_is_the_definition_at_any_incoming_scale(chunk_bytes, smoothing, z_loss, scale):
    hidden, matrix, targets = tensors()
    loss, score, term = lean(hidden, matrix, targets, chunk_bytes=chunk_bytes, smoothing=smoothing, z_loss=z_loss)
    found = torch.autograd.grad(scale * loss, [hidden, matrix])
    rows = reference.cross_entropy(hidden @ matrix.T, targets, smoothing, z_loss)
    expected = torch.autograd.grad(scale * 0.5 * rows.sum(), [hidden, matrix])
    torch.testing.assert_close(loss, 0.5 * rows.sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(term.square_sum, rows.square().sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(score.predictions, (hidden @ matrix.T).argmax(1))
    plain = reference.cross_entropy(hidden @ matrix.T, targets, 0.0, 0.0).sum()
    torch.testing.assert_close(score.nll_sum, plain.detach(), rtol=1e-12, atol=0)


def test_extreme_logits_stay_finite():
    hidden, matrix, targets = tensors()
    loss, _, _ = lean(hidden * 1e4, matrix, targets, chunk_bytes=200)
    gradients = torch.autograd.grad(loss, [hidden, matrix])
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_half_precision_holds_flat_scores_of_a_large_vocabulary():
    matrix = 0.02 * torch.randn(150_000, 2, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([1, 70_000, IGNORE])
    weights = {dtype: matrix.half().to(dtype).requires_grad_() for dtype in (torch.float16, torch.float32)}
    hiddens = {dtype: torch.tensor([[1.0, 0.0]] * 3, dtype=dtype).requires_grad_() for dtype in weights}
    score = CrossEntropy(targets, smoothing=0.0, z_loss=0.0, predicts=False)
    chunked_loss(
        [hiddens[torch.float16]], {0: weights[torch.float16]}, [Term(0, score, torch.tensor(0.5))], chunk_bytes=2**30
    ).backward()
    exact = hiddens[torch.float32] @ weights[torch.float32].T
    torch.nn.functional.cross_entropy(exact, targets, ignore_index=IGNORE).backward()
    for tensors in (weights, hiddens):
        torch.testing.assert_close(
            tensors[torch.float16].grad.float(), tensors[torch.float32].grad, rtol=5e-3, atol=2e-5
        )


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_the_compiled_rule_is_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    for dtype, smoothing, z_loss, predicts in itertools.product(
        (torch.float32, torch.bfloat16), (0.0, 0.1), (0.0, 1e-3), (False, True)
    ):
        hidden, matrix = (torch.randn(size, 16, generator=generator).to(dtype) for size in (37, 301))
        targets = torch.randint(301, (37,), generator=generator)
        targets[::5] = IGNORE
        learns = torch.rand(37, generator=generator) < 0.8
        found = []
        for compiles in (False, True):
            leaves = [tensor.clone().requires_grad_() for tensor in (hidden, matrix)]
            score = CrossEntropy(
                targets, smoothing=smoothing, z_loss=z_loss, predicts=predicts, learns=learns, compiles=compiles
            )
            term = Term(0, score, torch.tensor(0.5))
            chunked_loss([leaves[0]], {0: leaves[1]}, [term], chunk_bytes=10 * 301 * 8).backward()
            kept = [] if score.predictions is None else [score.predictions]
            found.append([score.nll_sum, term.loss_sum, term.square_sum, *kept, *(leaf.grad for leaf in leaves)])
        torch.testing.assert_close(found[1], found[0])
        chunk = score(torch.randn(37, 301), slice(0, 37), torch.bfloat16)
        assert chunk.gradient.dtype == torch.bfloat16, "the plain rule would leave it to the product"


@pytest.mark.parametrize("frozen", ["hidden", "matrix"])
def test_frozen_parts_get_no_gradient(frozen):
    hidden, matrix, targets = tensors()
    (hidden if frozen == "hidden" else matrix).requires_grad_(False)
    loss, _, _ = lean(hidden, matrix, targets, chunk_bytes=200)
    loss.backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (matrix.grad is None) == (frozen == "matrix")


def test_without_gradients_nothing_is_kept():
    hidden, matrix, targets = tensors()
    with torch.no_grad():
        loss, _, _ = lean(hidden, matrix, targets, chunk_bytes=200)
    assert not loss.requires_grad


def test_a_second_backward_is_refused_rather_than_wrong():
    hidden, matrix, targets = tensors()
    loss, _, _ = lean(hidden, matrix, targets, chunk_bytes=200)
    (0.25 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


def token_order_at(row, tokens, documents, position, window):
    """The definition, token by token: a softmax of how near each token's next occurrence in the document is."""
    scores = {}
    for distance, place in enumerate(range(position + 1, min(position + 1 + window, len(tokens)))):
        if documents[place] == documents[position]:
            scores.setdefault(int(tokens[place]), float(window - distance))
    if not scores:
        return torch.zeros(())
    shares = torch.tensor([*scores.values()], dtype=torch.float64).softmax(0)
    return -(shares * row.log_softmax(0)[[*scores]]).sum()


@pytest.mark.parametrize("window", [1, 3, 50])
@pytest.mark.parametrize("chunk_bytes", [1, 400, 10**6])
def test_token_order_is_the_definition(window, chunk_bytes):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(6, (2, 9), generator=generator)
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 8 + [1]])
    num_offsets, num_positions = 2, 7
    logits = torch.randn(2, num_positions, 6, generator=generator, dtype=torch.float64)
    matrix = torch.eye(6, dtype=torch.float64, requires_grad=True)
    hidden = logits.flatten(0, 1).requires_grad_()
    term = Term(0, TokenOrder(tokens, documents, num_offsets, window), torch.tensor(1.0, dtype=torch.float64))
    loss = chunked_loss([hidden], {0: matrix}, [term], chunk_bytes=chunk_bytes)
    scored = hidden.view(2, 7, 6)
    expected = reference.token_order(scored, tokens, documents, window).sum()
    one_by_one = [
        token_order_at(row, tokens[number], documents[number], position, window)
        for number in (0, 1)
        for position, row in enumerate(scored[number])
    ]
    torch.testing.assert_close(expected, sum(one_by_one), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (loss, expected)), rtol=1e-10, atol=1e-14)


def test_chunks_keep_to_the_budget():
    assert chunk_rows(2048, 32000, torch.float32, 64 * 2**20) == 512
    assert chunk_rows(2048, 32000, torch.bfloat16, 64 * 2**20) == 256
    assert chunk_rows(10, 32000, torch.float32, 1) == 1
    assert chunk_rows(10, 7, torch.float32, 10**9) == 10
