"""A step that is logged also counts right predictions; it must teach what any other step does."""

import torch

from mtp_lightning.losses.targets import IGNORE, shifted_targets
from mtp_lightning.model.freezing import freeze
from mtp_lightning.training.step.backward_order import accumulate_gradients
from mtp_lightning.training.step.batch import MicroBatch
from mtp_lightning.training.step.objective import Objective
from tests.support.covering import every_pair
from tests.support.tiny import tiny_model, tiny_recipe, tiny_rows


@every_pair(
    backward_order=["joint", "sequential", "bridged"],
    kind=["parallel", "linear", "medusa", "sequential"],
    frozen=[("trunk",), ("trunk", "heads"), ("trunk", "unembedding"), ("heads",)],
    full=True,
)
def test_logging_changes_no_gradient(backward_order: str, kind: str, frozen: tuple[str, ...]) -> None:
    """The main head of a frozen trunk has no gradient path to its state, but its norm and matrix learn."""
    recipe = tiny_recipe(heads={"kind": kind}, freeze=[*frozen], objective={"backward_order": backward_order})
    tokens, documents, mask = tiny_rows(recipe, 2)
    targets = shifted_targets(tokens, documents, recipe.heads.num_offsets, mask)
    counts = (targets != IGNORE).sum((1, 2)).to(torch.float64)
    gradients = []
    for predicts in (False, True):
        model = tiny_model(recipe)
        freeze(model, recipe)
        objective = Objective(recipe.objective, [1.0] * len(counts), counts, counts[0], predicts)
        accumulate_gradients(model, MicroBatch(tokens, documents, targets), objective, torch.Tensor.backward)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, logged = gradients
    assert plain.keys() == logged.keys() != set()
    for name, gradient in plain.items():
        assert gradient is not None
        assert torch.equal(gradient, logged[name])
