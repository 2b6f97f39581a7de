"""Law 1 under a loss scale: whatever each backward pass multiplies by, gradients bear it once."""

import pytest
import torch

from mtp_lightning.losses.targets import IGNORE, shifted_targets
from mtp_lightning.training.step.backward_order import accumulate_gradients
from mtp_lightning.training.step.batch import MicroBatch
from mtp_lightning.training.step.objective import Objective
from tests.support.covering import every_pair
from tests.support.tiny import HEAD_KINDS, relative_error, tiny_model, tiny_recipe, tiny_rows

SCALE = 2.0**12


def gradients(kind, backward_order, scale, dtype=torch.float64):
    recipe = tiny_recipe(
        heads=HEAD_KINDS[kind], objective={"backward_order": backward_order, "chunk_mib": 5 * 13 * 8 / 2**20}
    )
    model = tiny_model(recipe, dtype)
    tokens, documents, mask = tiny_rows(recipe, 2)
    targets = shifted_targets(tokens, documents, recipe.heads.num_offsets, mask)
    counts = (targets != IGNORE).sum((1, 2)).to(torch.float64)
    objective = Objective(recipe.objective, [1.0] * len(counts), counts, loss_scale=scale)
    accumulate_gradients(
        model, MicroBatch(tokens, documents, targets), objective, lambda loss: (loss * scale).backward()
    )
    return {name: p.grad for name, p in model.named_parameters()}


@every_pair(kind=HEAD_KINDS, backward_order=["sequential", "bridged", "joint"])
def test_the_scale_arrives_once(kind, backward_order):
    expected, found = gradients(kind, "joint", 1.0), gradients(kind, backward_order, SCALE)
    for name, gradient in expected.items():
        assert relative_error(found[name] / SCALE, gradient) < 1e-10, name


@pytest.mark.parametrize("backward_order", ["sequential", "bridged"])
def test_half_precision_keeps_small_gradients_until_they_are_scaled(backward_order):
    """Loss coefficients of a real batch push gradients below what fp16 can hold; the scale must come first."""

    def half(scale):
        recipe = tiny_recipe(objective={"backward_order": backward_order})
        model = tiny_model(recipe, torch.float16)
        tokens, documents, mask = tiny_rows(recipe, 2)
        targets = shifted_targets(tokens, documents, recipe.heads.num_offsets, mask)
        counts = torch.full((4,), 1e9)
        objective = Objective(recipe.objective, [1.0] * 4, counts, loss_scale=scale)
        accumulate_gradients(
            model, MicroBatch(tokens, documents, targets), objective, lambda loss: (loss * scale).backward()
        )
        return next(p.grad for p in model.unembedding.lm_heads.parameters())

    assert not half(1.0).any(), "without a scale this gradient is nothing but zeros in fp16"
    assert half(2.0**27).count_nonzero() > 0.9 * half(2.0**27).numel()
