"""Law 1 with low-rank updates, frozen parts and mixtures: backward orders agree, and what is trained has gradients."""

import torch

from mtp_lightning.losses.targets import count_targets, shifted_targets
from mtp_lightning.model.freezing import freeze
from mtp_lightning.training.step.backward_order import evaluate
from mtp_lightning.training.step.batch import MicroBatch
from mtp_lightning.training.step.objective import Objective
from tests.support.covering import every_pair
from tests.support.tiny import HEAD_KINDS, gradients_of, relative_error, tiny_model, tiny_recipe, tiny_rows

TOLERANCE = 1e-10
MIXTURES = {"layer_mix": {"temperature": 0.5}}
ADAPTATIONS = {
    "updates": ({"lora": {"rank": 2}}, []),
    "updates_everywhere": ({"lora": {"rank": 2, "in_heads": True, "targets": ["o", "up", "down"]}}, []),
    "updates_alone": ({"lora": {"rank": 2}}, ["heads", "unembedding"]),
    "updates_under_a_frozen_main_head": ({"lora": {"rank": 2}}, ["offsets_below_2"]),
    "heads_alone": ({}, ["trunk", "unembedding"]),
    "heads_and_unembedding": ({}, ["trunk"]),
    "unembedding_alone": ({}, ["trunk", "heads"]),
    "trunk_alone": ({}, ["heads", "unembedding"]),
    "mixtures": (MIXTURES, []),
    "mixtures_of_a_frozen_trunk": (MIXTURES, ["trunk", "unembedding"]),
    "mixtures_alone": (MIXTURES, ["trunk", "heads", "unembedding"]),
    "mixtures_and_updates": (MIXTURES | {"lora": {"rank": 2}}, ["unembedding"]),
    "mixtures_of_other_heads": ({"layer_mix": {"main_head": False}, "lora": {}}, []),
}
WITHOUT_LAYERS = ("linear", "medusa", "medusa_replicated")
READING_THE_TRUNK = ("parallel", "parallel_two_layers", "parallel_replicated", "linear", "medusa", "medusa_replicated")


def fits(kind, adaptation, **_):
    """Leave out what a recipe's rules refuse."""
    if adaptation == "updates_everywhere":
        return kind not in WITHOUT_LAYERS
    if adaptation == "mixtures_of_other_heads":
        return kind in READING_THE_TRUNK
    return adaptation != "updates_under_a_frozen_main_head" or kind != "anticausal"


def steps_of(kind, adaptation, objective, *, rows=4):
    """Losses and gradients of a step under each backward order."""
    adapt, frozen = ADAPTATIONS[adaptation]
    memory = objective.get("memory", {})
    objective = {name: value for name, value in objective.items() if name != "memory"}
    for backward_order in ("joint", "sequential", "bridged"):
        recipe = tiny_recipe(
            model={"num_hidden_layers": 9},
            heads=HEAD_KINDS[kind],
            freeze=frozen,
            adapt=adapt,
            memory=memory,
            objective={"backward_order": backward_order, "chunk_mib": 5 * 13 * 8 / 2**20} | objective,
            data={"document_mask": True},
            batch={"global_batch_size": rows, "micro_batch_size": 2},
        )
        model = tiny_model(recipe)
        freeze(model, recipe)
        yield model, gradients_of(model, recipe, tiny_rows(recipe, rows))


OBJECTIVES = {
    "plain": {},
    "balanced": {"balance": "rms"},
    "recomputed": {"memory": {"recompute_trunk": True, "recompute_heads": True}},
    "taught": {"distill": {"detach_teacher": False}},
}


@every_pair(fits, full=True, one_in=2, kind=HEAD_KINDS, adaptation=ADAPTATIONS, objective=OBJECTIVES)
def test_schedules_agree(kind, adaptation, objective):
    (model, (expected_losses, expected)), *others = steps_of(kind, adaptation, OBJECTIVES[objective])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert expected.keys() == trained != set()
    for _, (losses, gradients) in others:
        for found, wanted in zip(losses, expected_losses, strict=True):
            assert relative_error(found.nll_sums, wanted.nll_sums) <= TOLERANCE
        assert gradients.keys() == expected.keys()
        errors = {name: relative_error(gradients[name], expected[name]) for name in expected}
        assert max(errors.values()) <= TOLERANCE, errors


def test_overlaps_are_measured_under_balanced_losses_too():
    found = []
    for balance in ("rms", "none"):
        recipe = tiny_recipe(objective={"balance": balance})
        tokens, documents, _ = tiny_rows(recipe, 2)
        targets = shifted_targets(tokens, documents, recipe.heads.num_offsets)
        counts = count_targets(targets).double()
        objective = Objective(recipe.objective, [1.0] * len(targets), counts, predicts=True)
        found.append(evaluate(tiny_model(recipe), MicroBatch(tokens, documents, targets), objective).overlaps)
    assert found[1][1:].max() > 0.1
    assert torch.equal(*found)
