"""Liger Kernel's cross-entropy against ours: losses, gradients and what is measured.

Its real kernels run here, on a CPU by Triton's interpreter, where they are installed:
`pip install liger-kernel triton`, then `TRITON_INTERPRET=1 pytest tests/losses/test_liger.py`: Triton reads it
when it is first imported.
"""

import os
import re
from importlib.util import find_spec

import pytest
import torch

from mtp_lightning.errors import TrainingError
from mtp_lightning.losses import liger
from mtp_lightning.losses.chunked import Term, chunked_loss
from mtp_lightning.losses.liger import check_liger, liger_loss
from mtp_lightning.losses.logit_map import LogitMap
from mtp_lightning.losses.row_losses import CrossEntropy
from mtp_lightning.losses.targets import IGNORE
from mtp_lightning.model.freezing import freeze
from mtp_lightning.recipe.draft_vocabulary import with_draft_ids
from tests.support.tiny import HEAD_KINDS, gradients_of, relative_error, tiny_model, tiny_recipe, tiny_rows

IS_HERE = find_spec("liger_kernel") and find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1"
needs_liger = pytest.mark.skipif(not IS_HERE, reason="needs liger-kernel, triton and TRITON_INTERPRET=1")
ROWS, WIDTH, VOCABULARY = 37, 24, 83
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}  # of norms; scores and their gradients are rounded to bf16


def losses(
    kernel, dtype, *, bias=False, learns=(True, True), logit_map=None, num_terms=2, all_ignored=False, **settings
):
    """Loss of two terms that share a matrix; gradients, sums and predictions."""
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    hiddens = [torch.randn(ROWS, WIDTH, **draw).to(dtype).requires_grad_(learns[0]) for _ in range(num_terms)]
    matrix = (0.4 * torch.randn(VOCABULARY, WIDTH, **draw)).to(dtype).requires_grad_(learns[1])
    biases = {0: torch.randn(VOCABULARY, **draw).to(dtype).requires_grad_(learns[1])} if bias else {}
    targets = torch.randint(VOCABULARY, (num_terms, ROWS), generator=generator)
    targets[0, ::4] = targets[1, 3:20] = IGNORE
    if all_ignored:
        targets[1] = IGNORE
    settings = {"smoothing": 0.0, "z_loss": 0.0} | settings
    scores = [CrossEntropy(own, predicts=True, kernel=kernel, **settings) for own in targets]
    terms = [Term(0, score, torch.tensor(own)) for score, own in zip(scores, (0.5, 0.03), strict=True)]
    maps = {} if logit_map is None else {0: logit_map}
    total = chunked_loss(hiddens, {0: matrix}, terms, chunk_bytes=7 * VOCABULARY * 8, biases=biases, logit_maps=maps)
    wanted = [tensor for tensor in (*hiddens, matrix, *biases.values()) if tensor.requires_grad]
    gradients = torch.autograd.grad(0.25 * total, wanted) if wanted else ()
    return total.detach(), gradients, [score.nll_sum for score in scores], [score.predictions for score in scores]


CASES = {
    "plain": {},
    "smoothing": {"smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "smoothing, z_loss and a bias": {"smoothing": 0.2, "z_loss": 0.01, "bias": True},
    "matrix frozen": {"learns": (True, False)},
    "hidden states frozen": {"learns": (False, True)},
    "nothing learns": {"learns": (False, False)},
    "scores scaled": {"logit_map": LogitMap(scale=0.3)},
    "no target at one offset": {"all_ignored": True, "smoothing": 0.1},
}


@needs_liger
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_liger_and_our_loss_agree(case, dtype):
    """Within a part of the norm; what is frozen gets no gradient, what is measured is measured for every row."""
    total, gradients, nll, predictions = losses("liger", dtype, **CASES[case])
    exact, wanted, own_nll, own_predictions = losses("own", dtype, **CASES[case])
    close = {"rtol": TOLERANCE[dtype], "atol": 1e-9}
    torch.testing.assert_close(total.double(), exact.double(), **close)
    for found, own in zip(nll, own_nll, strict=True):
        torch.testing.assert_close(torch.as_tensor(found).double(), torch.as_tensor(own).double(), **close)
    assert len(gradients) == len(wanted)
    for found, own in zip(gradients, wanted, strict=True):
        assert found.dtype == own.dtype
        assert (found.double() - own.double()).norm() <= TOLERANCE[dtype] * own.double().norm()
    for found, own in zip(predictions, own_predictions, strict=True):
        assert (found == own).float().mean() >= (1 if dtype == torch.float32 else 0.9)  # scores that tie when rounded


REPLICATED = HEAD_KINDS["medusa_replicated"]
MODELS = {
    "parallel": {},
    "a matrix per offset": {"heads": REPLICATED, "objective": {"backward_order": "bridged"}},
    "sequential, smoothed": {"heads": HEAD_KINDS["sequential"], "objective": {"label_smoothing": 0.1, "z_loss": 0.01}},
    "a draft vocabulary": {"heads": {"draft_vocabulary": 6}},
    "frozen trunk, token order": {"freeze": ["trunk"], "objective": {"token_order": {"window_size": 6}}},
}


@needs_liger
@pytest.mark.slow
@pytest.mark.parametrize("case", MODELS)
def test_a_model_learns_and_measures_the_same(case):
    """Gradients of all parameters, over two micro-batches of documents under a mask; losses and predictions."""
    recipe = tiny_recipe(batch={"micro_batch_size": 1}, **MODELS[case])
    if recipe.heads.draft_vocabulary:
        recipe = with_draft_ids(recipe, [1, 3, 4, 8, 9, 12])
    found, expected = (measured(recipe, kernel) for kernel in ("liger", "own"))
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        assert relative_error(gradient, expected[1][name]) < 1e-5, name
    for ours, theirs in zip(expected[0], found[0], strict=True):
        torch.testing.assert_close(theirs.nll_sums, ours.nll_sums, rtol=1e-5, atol=1e-6)
        assert torch.equal(theirs.predictions, ours.predictions)


def measured(recipe, kernel):
    """Losses and gradients of two rows."""
    model = tiny_model(recipe, torch.float32)
    freeze(model, recipe)
    model.loss_kernel = kernel
    return gradients_of(model, recipe, tiny_rows(recipe, 2))


@needs_liger
def test_smoothing_over_capped_scores_is_refused():
    hidden, matrix, targets = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TrainingError, match=r"label_smoothing must be 0 .* caps, .*; found 0.1, and a cap of 30"):
        liger_loss(hidden, matrix, targets, smoothing=0.1, cap=30.0, wants=(True, True), chunk_bytes=99)


@pytest.mark.parametrize("vocab_size", [32_000, 128_000, 151_936])
@pytest.mark.parametrize("width", [1024, 5120])
def test_chunks_keep_to_their_bytes_and_are_no_smaller_than_half(width, vocab_size):
    """Liger's own rule: the power of two that is not less than the rows of so many chunks."""
    num_rows, chunk_bytes = 32_768, 2**30
    hidden = torch.empty(num_rows, width, dtype=torch.bfloat16, device="meta")
    factor = liger._chunk_factor(hidden, torch.empty(vocab_size, width, device="meta"), chunk_bytes)
    num_chunks = -(-vocab_size // (factor * width))
    rows = 1 << (-(-num_rows // num_chunks) - 1).bit_length()
    assert chunk_bytes / 4 <= rows * vocab_size * 2 <= chunk_bytes


def test_a_missing_package_and_a_cpu_are_told(monkeypatch):
    monkeypatch.setattr(liger, "find_spec", lambda name: None)
    with pytest.raises(TrainingError, match=re.escape("pip install 'mtp_lightning[liger]'")):
        check_liger(torch.device("cuda"))
    monkeypatch.setattr(liger, "find_spec", lambda name: name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(TrainingError, match="needs a GPU for its Triton kernels; found device cpu"):
        check_liger(torch.device("cpu"))
