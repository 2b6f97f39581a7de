"""Law 1 under bf16 autocast (up to the noise of summation order) and under torch.compile."""

import shutil

import pytest
import torch

from tests.support.covering import some_of
from tests.support.tiny import HEAD_KINDS, gradients_of, relative_error, tiny_model, tiny_recipe, tiny_rows


def step(backward_order, kind, *, chunk_rows=7, order=slice(None), autocast=True, compiled=False):
    objective = {"backward_order": backward_order, "chunk_mib": chunk_rows * 13 * 8 / 2**20}
    recipe = tiny_recipe(heads=HEAD_KINDS[kind], objective=objective, data={"seq_len": 24})
    model = tiny_model(recipe, torch.float32)
    if compiled:
        model.compile_parts()
    tokens, documents, mask = (part[order] for part in tiny_rows(recipe, 2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, gradients = gradients_of(model, recipe, (tokens, documents, mask))
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


@pytest.mark.parametrize("kind", some_of(HEAD_KINDS, one_in=3))
def test_sequential_bf16_is_within_the_noise_of_joint_bf16(kind):
    joint = step("joint", kind)
    exact = step("joint", kind, autocast=False)
    noise = max(relative_error(step("joint", kind, order=[1, 0]), joint), relative_error(joint, exact))
    for backward_order in ("sequential", "bridged"):
        for chunk_rows in (5, 1000):
            error = relative_error(step(backward_order, kind, chunk_rows=chunk_rows), joint)
            assert 0 < error < 2 * noise, (backward_order, chunk_rows, error, noise)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["parallel", "causal", "sequential"])
@pytest.mark.parametrize("backward_order", ["sequential", "bridged", "joint"])
def test_compiled_parts_have_the_same_gradients(kind, backward_order):
    plain = step(backward_order, kind, autocast=False)
    compiled = step(backward_order, kind, autocast=False, compiled=True)
    assert 0 < relative_error(compiled, plain) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
def test_the_loss_of_a_compiled_model_is_compiled():
    for backward_order in ("sequential", "bridged"):
        torch._dynamo.reset()
        recipe = tiny_recipe(heads=HEAD_KINDS["linear"], objective={"backward_order": backward_order})
        for is_compiled in (False, True):
            model = tiny_model(recipe, torch.float32)
            model.is_compiled = is_compiled  # its loss alone
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            gradients_of(model, recipe, tiny_rows(recipe, 2))
            assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > before) == is_compiled
