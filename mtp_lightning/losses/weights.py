"""Weight of every offset's loss as a pure function of the step."""

import math

from mtp_lightning.recipe.schema.objective import (
    ConstantWeights,
    CurriculumWeights,
    DecayWeights,
    LambdaWeights,
    OffsetWeights,
)


def offset_weights(spec: OffsetWeights, num_offsets: int, step: int, num_steps: int) -> list[float]:
    """Weights of offsets 1 to n at a step (0-based) of a run of `num_steps` steps.

    >>> offset_weights(DecayWeights(kind="decay", beta=0.5), 4, step=0, num_steps=10)
    [1.0, 0.5, 0.25, 0.125]
    """
    match spec:
        case ConstantWeights():
            return list(spec.values) if spec.values is not None else [1.0] * num_offsets
        case DecayWeights():
            return [1.0, *_decayed(spec, num_offsets - 1)]
        case LambdaWeights():
            extras = max(1, num_offsets - 1)
            return [1.0] + [_lambda_at(spec, step / num_steps) / extras] * (num_offsets - 1)
        case CurriculumWeights():
            return _curriculum(spec, num_offsets, step, num_steps)


def _decayed(spec: DecayWeights, num_extras: int) -> list[float]:
    """Medusa's beta^k without a total; FastMTP's normalised beta^(k-1) with total 1."""
    powers = [spec.beta**k for k in range(1, num_extras + 1)]
    scale = 1.0 if spec.total is None else spec.total / (sum(powers) or 1.0)
    return [scale * power for power in powers]


def _lambda_at(spec: LambdaWeights, share: float) -> float:
    if share >= spec.ends_at:
        return spec.end
    if spec.change == "step" or share <= spec.begins_at:
        return spec.start
    done = (share - spec.begins_at) / (spec.ends_at - spec.begins_at)
    if spec.change == "cosine":
        done = (1 - math.cos(math.pi * done)) / 2
    return spec.start + done * (spec.end - spec.start)


def _curriculum(spec: CurriculumWeights, num_offsets: int, step: int, num_steps: int) -> list[float]:
    passed = step * num_offsets // num_steps
    active = passed + 1 if spec.direction == "forward" else num_offsets - passed
    active = min(max(active, 1), num_offsets)
    return [1.0] * active + [0.0] * (num_offsets - active)
