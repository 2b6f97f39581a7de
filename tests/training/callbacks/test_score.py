import math

import pytest

from mtp_lightning.training.saving.save_checkpoints import CheckpointScore, score_of


@pytest.mark.parametrize(
    ("better", "worse", "why"),
    [
        (CheckpointScore(1, 2.5, 2.0), CheckpointScore(2, 2.4, 2.0), "longer"),
        (CheckpointScore(1, 2.5, 2.05), CheckpointScore(2, 2.4, 2.0), "longer, though the loss is a little higher"),
        (CheckpointScore(2, 1.5, 2.0), CheckpointScore(1, 4.0, 3.0), "heads that agree on nonsense"),
        (CheckpointScore(1, 1.0, 1.9), CheckpointScore(2, 1.0, 1.91), "equal lengths: lower loss"),
        (CheckpointScore(2, 1.0, 1.9), CheckpointScore(1, 1.0, 1.9), "all equal: later"),
    ],
)
def test_one_of_two_scores_beats_the_other(better: CheckpointScore, worse: CheckpointScore, why: str) -> None:
    assert better.beats(worse)
    assert not worse.beats(better)


def test_any_score_beats_none() -> None:
    assert CheckpointScore(1, 1.0, 9.0).beats(None)


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"val/loss_1": 1.0},
        {"val/mean_acceptance_length": math.nan, "val/loss_1": 1.0},
        {"val/mean_acceptance_length": 2.0},
    ],
)
def test_without_figures_there_is_no_score(metrics: dict[str, float]) -> None:
    assert score_of(1, metrics) is None
