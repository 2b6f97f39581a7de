"""A run ends when its acceptance length stays where it is, and stays ended."""

import pytest

from mtp_lightning.checkpoint.format.folder import newest_complete
from mtp_lightning.checkpoint.format.state_tree import read_state
from mtp_lightning.launch.status import statuses
from mtp_lightning.recipe import load_recipe
from mtp_lightning.recipe.schema.root import EarlyStopSection
from mtp_lightning.training.fit import train
from mtp_lightning.training.health.early_stop import EarlyStop
from mtp_lightning.training.logging.metrics_files import read_rows
from tests.support.runs import ROOT

RUN = ("run.steps=40", "run.validate_every_steps=2", "checkpoint.every_steps=40", "logging.every_steps=1")


class Module:
    """What the callback sees of a module: figures."""

    def __init__(self, length, loss):
        self.metrics = {"val/mean_acceptance_length": length, "val/loss_1": loss}


class Trainer:
    """What the callback sees of a trainer."""

    is_global_zero, should_stop = True, False

    def __init__(self, step):
        self.global_step = step


def stops_at(figures, section):
    """Validation, counted from 1, at which a callback ends a run; None if it does not."""
    callback = EarlyStop(section)
    for number, (length, loss) in enumerate(figures, start=1):
        trainer = Trainer(number)
        callback.on_validation_end(trainer, Module(length, loss))
        if trainer.should_stop:
            return number
    return None


def test_only_a_gain_keeps_it_going():
    section = EarlyStopSection(validations=3, least_gain=0.1)
    assert stops_at([(2.0 + 0.2 * k, 1.0) for k in range(9)], section) is None
    assert stops_at([(2.0 + 0.05 * k, 1.0) for k in range(9)], section) is None  # every third is a gain of 0.15
    assert stops_at([(2.0 + 0.03 * k, 1.0) for k in range(9)], section) == 4
    assert stops_at([(2.0, 1.0)] * 9, section) == 4


def test_a_better_main_head_counts_though_fewer_drafts_are_accepted():
    section = EarlyStopSection(validations=2, least_gain=0.0)
    assert stops_at([(4.0 - k / 10, 5.0 * 0.9**k) for k in range(9)], section) is None
    assert stops_at([(4.0 - k / 10, 5.0 * 0.99**k) for k in range(9)], section) == 3


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A run whose acceptance length cannot rise by as much as is asked for."""
    folder = tmp_path_factory.mktemp("early")
    own = (
        "run.early_stop={validations: 2, least_gain: 4}",
        f"run.dir={folder / 'run'}",
        f"run.cache={folder / 'cache'}",
    )
    calm = ("optimizer.lr=1e-6", "run.threads=1")  # the main head's loss stays, too
    assert train(load_recipe(ROOT / "recipes/debug/parallel.yaml", [*RUN, *own, *calm])) == 0
    return folder / "run"


def test_a_run_ends_early_with_a_checkpoint_and_says_so(ended):
    newest = newest_complete(ended / "checkpoints")
    assert newest is not None
    assert newest.step == 6
    assert read_state(newest.path)["callbacks"]["EarlyStop"]["num_flat"] == 2
    assert read_rows(ended / "metrics.csv")[-1]["step"] == 6
    (status,) = statuses([ended])
    assert (status.state, status.step, status.steps) == ("finished", 6, 40)


def test_it_stays_ended_until_more_is_allowed(ended, capsys):
    before = sorted(ended.glob("checkpoints/step-*"))
    assert train(load_recipe(ended / "recipe.yaml")) == 0
    assert "Raise run.early_stop.validations to go on" in capsys.readouterr().out
    assert sorted(ended.glob("checkpoints/step-*")) == before
    assert train(load_recipe(ended / "recipe.yaml", ["run.early_stop.validations=3"])) == 0
    assert read_rows(ended / "metrics.csv")[-1]["step"] == 8
