"""Offset metrics against the definitions, written out position by position."""

import math

import pytest
import torch

from mtp_lightning.losses.targets import IGNORE, shifted_targets
from mtp_lightning.training.step.backward_order import evaluate
from mtp_lightning.training.step.batch import MicroBatch
from mtp_lightning.training.step.metrics import OffsetMetrics
from mtp_lightning.training.step.objective import Objective, OffsetLosses
from tests.support.tiny import tiny_model, tiny_recipe, tiny_rows

N, B, T = 3, 2, 9


def micro_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(3, (N, B, T), generator=generator)
    targets[torch.rand(N, B, T, generator=generator) < 0.2] = IGNORE
    predictions = torch.randint(3, (N, B, T), generator=generator)
    return targets, OffsetLosses(torch.rand(N, generator=generator) * 9, predictions)


def by_hand(batches):
    """Count as `training/metrics.py` defines: the main head speaks of the same token k-1 positions later."""
    figures = {}
    for k in range(1, N + 1):
        valid = [
            (targets, losses.predictions, b, t)
            for targets, losses in batches
            for b in range(B)
            for t in range(T)
            if targets[k - 1, b, t] != IGNORE
        ]
        figures[f"loss_{k}"] = float(sum(losses.nll_sums[k - 1] for _, losses in batches)) / len(valid)
        right = [bool(predicted[k - 1, b, t] == targets[k - 1, b, t]) for targets, predicted, b, t in valid]
        figures[f"label_accuracy_{k}"] = sum(right) / len(right)
        raise_on_all_ranks = [bool(p[k - 1, b, t] == p[0, b, t + k - 1]) for _, p, b, t in valid if t + k - 1 < T]
        figures[f"agreement_{k}"] = sum(raise_on_all_ranks) / len(raise_on_all_ranks)
    del figures["agreement_1"]
    drafts = [
        [bool(losses.predictions[k, b, t] == losses.predictions[0, b, t + k]) for k in range(1, N)]
        for targets, losses in batches
        for b in range(B)
        for t in range(T - N + 1)
        if all(targets[k, b, t] != IGNORE for k in range(N))
    ]
    before = 1.0
    for k in range(2, N + 1):
        cumulative = sum(all(draft[: k - 1]) for draft in drafts) / len(drafts)
        figures[f"acceptance_rate_{k}"] = cumulative
        figures[f"conditional_acceptance_rate_{k}"] = cumulative / before
        before = cumulative
    figures["mean_acceptance_length"] = 1 + sum(figures[f"acceptance_rate_{k}"] for k in range(2, N + 1))
    return figures


@pytest.mark.parametrize("num_batches", [1, 3, 40])
def test_figures_are_the_definitions(num_batches):
    batches = [micro_batch(seed) for seed in range(num_batches)]
    metrics = OffsetMetrics(N)
    for targets, losses in batches:
        metrics.update(targets, losses)
    expected = by_hand(batches)
    found = metrics.compute()
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-6)


def test_evaluations_do_not_mix():
    metrics = OffsetMetrics(N)
    metrics.update(*micro_batch(0))
    metrics.reset()
    metrics.update(*micro_batch(1))
    assert metrics.compute() == pytest.approx(by_hand([micro_batch(1)]), rel=1e-6)


def test_an_offset_that_was_not_computed_has_no_loss_and_no_acceptance():
    targets, losses = micro_batch(0)
    losses.nll_sums[2] = torch.nan
    metrics = OffsetMetrics(N)
    metrics.update(targets, losses)
    figures = metrics.compute()
    assert math.isnan(figures["loss_3"])
    assert math.isnan(figures["agreement_3"])
    assert math.isfinite(figures["loss_2"])


def test_sampled_acceptance_and_divergence_are_the_definitions():
    batches = []
    for seed in range(3):
        targets, losses = micro_batch(seed)
        generator = torch.Generator().manual_seed(seed)
        overlaps = torch.rand(N, B, T, generator=generator)
        overlaps[0] = 1
        sums = torch.rand(N, generator=generator)
        sums[0] = torch.nan
        batches.append((targets, losses._replace(overlaps=overlaps, divergence_sums=sums)))
    metrics = OffsetMetrics(N)
    for targets, losses in batches:
        metrics.update(targets, losses)
    found = metrics.compute()
    expected_length = 1.0
    for k in range(2, N + 1):
        taught = [
            (losses.overlaps, b, t)
            for targets, losses in batches
            for b in range(B)
            for t in range(T - k + 1)
            if targets[k - 1, b, t] != IGNORE
        ]
        drafted = [
            (losses.overlaps, b, t)
            for targets, losses in batches
            for b in range(B)
            for t in range(T - N + 1)
            if all(targets[j, b, t] != IGNORE for j in range(N))
        ]
        overlap = sum(float(o[k - 1, b, t]) for o, b, t in taught) / len(taught)
        accepted = sum(math.prod(float(o[j, b, t]) for j in range(1, k)) for o, b, t in drafted) / len(drafted)
        divergence = float(sum(losses.divergence_sums[k - 1] for _, losses in batches)) / len(taught)
        assert found[f"overlap_{k}"] == pytest.approx(overlap, rel=1e-6)
        assert found[f"sampled_acceptance_rate_{k}"] == pytest.approx(accepted, rel=1e-6)
        assert found[f"divergence_{k}"] == pytest.approx(divergence, rel=1e-6)
        expected_length += accepted
    assert found["sampled_acceptance_length"] == pytest.approx(expected_length, rel=1e-6)


def test_overlaps_are_those_of_full_logits():
    recipe = tiny_recipe(heads={"kind": "sequential"}, objective={"distill": {}, "chunk_mib": 0.001})
    model = tiny_model(recipe)
    tokens, documents, mask = tiny_rows(recipe, 2)
    targets = shifted_targets(tokens, documents, 4, mask)
    objective = Objective(recipe.objective, [1.0] * 4, (targets != IGNORE).sum((1, 2)).double(), predicts=True)
    losses = evaluate(model, MicroBatch(tokens, documents, targets), objective)
    hiddens = model.hidden_states(tokens, documents)
    p, *others = (model.unembedding.logits(k, hidden).softmax(2) for k, hidden in hiddens.items())
    for k, q in enumerate(others, start=2):
        expected = torch.minimum(q[:, : 1 - k], p[:, k - 1 :]).sum(2)
        is_valid = targets[k - 1, :, : 1 - k] != IGNORE
        torch.testing.assert_close(losses.overlaps[k - 1, :, : 1 - k][is_valid], expected[is_valid])
    assert losses.divergence_sums is None
