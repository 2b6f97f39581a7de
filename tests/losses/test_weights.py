"""Offset weights over a run."""

import pytest

from mtp_lightning.losses.weights import offset_weights
from mtp_lightning.recipe.schema.objective import ConstantWeights, CurriculumWeights, DecayWeights, LambdaWeights


def over_run(spec, n=4, steps=10):
    return [offset_weights(spec, n, step, steps) for step in range(steps)]


def test_constant():
    assert over_run(ConstantWeights())[3] == [1, 1, 1, 1]
    assert over_run(ConstantWeights(values=[1.0, 0.5, 0.0, 2.0]))[9] == [1, 0.5, 0, 2]


def test_fastmtp_weights():
    """FastMTP's published 0.51 / 0.31 / 0.18 for beta 0.6 and three extra offsets."""
    weights = offset_weights(DecayWeights(kind="decay", beta=0.6, total=1.0), 4, 0, 1)
    assert [round(weight, 2) for weight in weights] == [1.0, 0.51, 0.31, 0.18]


def test_medusa_weights():
    assert offset_weights(DecayWeights(kind="decay", beta=0.8), 3, 0, 1) == pytest.approx([1, 0.8, 0.64])


def test_deepseek_lambda_steps_down():
    """0.3 over the first 10 of 14.8 T tokens, 0.1 after, shared by the extra offsets."""
    weights = over_run(LambdaWeights(kind="lambda", ends_at=0.5), n=3)
    assert weights[0] == pytest.approx([1, 0.15, 0.15])
    assert weights[4] == weights[0]
    assert weights[5] == pytest.approx([1, 0.05, 0.05])


@pytest.mark.parametrize("change", ["linear", "cosine"])
def test_lambda_moves_between_its_ends(change):
    spec = LambdaWeights(kind="lambda", start=0.4, end=0.0, change=change, begins_at=0.2, ends_at=0.8)
    factors = [weights[1] for weights in over_run(spec, n=2)]
    assert factors[:3] == [0.4, 0.4, 0.4]
    assert factors[5] == pytest.approx(0.2)
    assert factors[8:] == [0, 0]
    assert factors == sorted(factors, reverse=True)


def test_curricula():
    forward = [sum(weights) for weights in over_run(CurriculumWeights(kind="curriculum"), steps=8)]
    assert forward == [1, 1, 2, 2, 3, 3, 4, 4]
    reverse = over_run(CurriculumWeights(kind="curriculum", direction="reverse"), steps=8)
    assert [sum(weights) for weights in reverse] == [4, 4, 3, 3, 2, 2, 1, 1]
    assert reverse[-1] == [1, 0, 0, 0]


EVERY_SPEC = [
    ConstantWeights(),
    DecayWeights(kind="decay"),
    LambdaWeights(kind="lambda"),
    CurriculumWeights(kind="curriculum"),
]


@pytest.mark.parametrize("spec", EVERY_SPEC, ids=lambda spec: spec.kind)
def test_one_offset_has_weight_one(spec):
    assert set(map(tuple, over_run(spec, n=1))) == {(1.0,)}
