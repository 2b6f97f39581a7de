"""The sequential backward order: how often an engine is asked for a backward pass."""

import pytest
import torch

from mtp_lightning.training.step.backward_order import accumulate_gradients
from mtp_lightning.training.step.batch import MicroBatch
from mtp_lightning.training.step.objective import Objective
from tests.support.tiny import HEAD_KINDS, tiny_model, tiny_recipe, tiny_rows


@pytest.mark.parametrize("kind", HEAD_KINDS)
@pytest.mark.parametrize("weights", [[1.0] * 4, [1.0, 0.5, 0.0, 0.0]], ids=["all offsets", "two of four"])
def test_each_head_has_one_backward_pass_and_the_trunk_one(kind, weights):
    """ZeRO-2 and 3 reduce gradients, and wait for that, at the end of every pass."""
    recipe = tiny_recipe(heads=HEAD_KINDS[kind])
    model, (tokens, documents, _) = tiny_model(recipe), tiny_rows(recipe, 2)
    targets = torch.stack([tokens[:, k : k + recipe.data.seq_len] for k in range(1, 5)])
    passes = []

    def backward(loss):
        passes.append(loss)
        loss.backward()

    objective = Objective(recipe.objective, weights, torch.full((4,), targets[0].numel()))
    accumulate_gradients(model, MicroBatch(tokens, documents, targets), objective, backward)
    num_heads = 4 if kind == "anticausal" else sum(weight > 0 for weight in weights)
    assert len(passes) == num_heads + 1
