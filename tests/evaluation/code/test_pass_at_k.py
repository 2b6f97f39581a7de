"""Law 13: the estimator is the share of all choices of k samples that hold one that passes."""

import itertools
import random

import pytest

from mtp_lightning.evaluation.code.score import best, estimate, figures, pass_at_k


def test_the_estimator_equals_brute_force():
    for n in range(1, 9):
        for c in range(n + 1):
            samples = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                chosen = list(itertools.combinations(samples, k))
                assert estimate(n, c, k) == pytest.approx(sum(map(any, chosen)) / len(chosen), abs=1e-12)
    assert estimate(1000, 1, 100) == pytest.approx(0.1)


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    generator = random.Random(0)
    holds = 0
    for _ in range(100):
        chances = [generator.random() for _ in range(60)]
        passes = [[generator.random() < chance for _ in range(5)] for chance in chances]
        found = pass_at_k(passes, 1, 0.8)
        holds += found.low <= 0.5 <= found.high
    assert 0.9 <= holds / 100 <= 0.99


def test_the_best_temperature_is_one_for_each_k():
    steady, varied = [[True, False], [False, False]], [[True, False], [False, True]]
    found = figures({0.8: varied, 0.2: steady, 0.0: [[True], [True]]}, [1, 2, 3])
    assert {(one.k, one.temperature) for one in found} == {(1, 0), (1, 0.2), (1, 0.8), (2, 0.2), (2, 0.8)}
    assert [(one.k, one.temperature, one.value) for one in best(found)] == [(1, 0.0, 1.0), (2, 0.8, 1.0)]
