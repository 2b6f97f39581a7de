"""Distillation keeps to the memory of cross-entropy alone: no tensor of (T, V), none of (T, K), no growth with n."""

import pytest

from mtp_lightning.planner.layout import with_backward_order, with_offsets
from tests.laws.test_memory import KINDS, MEASURED, MOST_GROWTH, counted, counted_peak, full_recipe, measured_peak
from tests.support.live_tensors import count_schedule

MOST_OVERHEAD = 1.25
DISTILLED = {"distill": {}}


def test_peak_and_largest_tensor_at_a_vocabulary_of_32000():
    recipe = full_recipe(KINDS["parallel"], DISTILLED)
    live, state_bytes = count_schedule(recipe)
    positions, distill = recipe.data.seq_len, recipe.objective.distill
    assert live.peak_bytes + state_bytes <= MOST_OVERHEAD * counted_peak(full_recipe(KINDS["parallel"]))
    assert live.largest_numel <= positions * recipe.model.vocab_size / 4
    assert live.largest_numel < positions * distill.resolved_top_k(recipe.model.vocab_size)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["all", "reached"])
def test_a_rollout_makes_no_tensor_of_all_logits(where):
    recipe = full_recipe(KINDS["sequential"], {"rollout": {"where": where}})
    live, _ = count_schedule(recipe)
    mask = (2 * recipe.data.seq_len) ** 2  # of two streams
    assert live.largest_numel <= max(mask, recipe.data.seq_len * recipe.model.vocab_size / 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [{}, {"detach_teacher": False}, {"alpha": [0.0], "top_k": "all"}, {"divergence": "lk_lambda"}]
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.xdist_group("counted peaks")
def test_every_kind(kind, fields):
    recipe = full_recipe(KINDS[kind], {"distill": fields})
    peak = counted_peak(recipe)
    assert peak <= MOST_OVERHEAD * counted(kind, "sequential")[1]
    assert peak <= MOST_GROWTH * counted_peak(with_offsets(recipe, 2))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bridged(precision):
    recipe, alone = (
        with_backward_order(full_recipe(KINDS["sequential"], objective, precision), "bridged")
        for objective in (DISTILLED, {})
    )
    assert counted_peak(recipe) <= MOST_OVERHEAD * counted_peak(alone)


@MEASURED
@pytest.mark.slow
def test_measured_peak_at_the_full_shape():
    recipe = full_recipe(KINDS["parallel"], DISTILLED)
    measured = measured_peak(recipe)
    assert measured <= MOST_OVERHEAD * measured_peak(full_recipe(KINDS["parallel"]))
    assert measured <= MOST_GROWTH * measured_peak(with_offsets(recipe, 2))
