"""Saving by step under manual optimization, the best checkpoint, and resuming."""

import math
import os
import pickle
import random
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from mtp_lightning.checkpoint.format.commit import read_pointer
from mtp_lightning.checkpoint.format.folder import complete_checkpoints, newest_complete
from mtp_lightning.checkpoint.format.state_tree import read_state
from mtp_lightning.errors import CheckpointError
from mtp_lightning.recipe.schema.root import LoggingSection, Recipe
from mtp_lightning.training.saving.save_checkpoints import Checkpoints
from tests.support import warm
from tests.support.runs import ROOT
from tests.training.callbacks.tiny_run import LAYERS, TinyModule, fit, tiny_recipe


class Saves(Callback):
    """Keeps (step, validations so far) of every save."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert checkpoint["global_step"] == trainer.global_step
        self.seen.append((trainer.global_step, pl_module.num_validations))


class Draws(Callback):
    """Draws from Python's and numpy's generators in every step, as augmentations do."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.drawn += [random.random(), float(np.random.rand())]


def weights(module: TinyModule) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def checkpoints_of(trainer: Trainer) -> Checkpoints:
    return next(callback for callback in trainer.callbacks if isinstance(callback, Checkpoints))


@pytest.mark.parametrize(("every", "validate"), [(2, 3), (2, 2), (3, 2), (1, 1), (4, 4), (4, 2), (100, 100)])
def test_every_due_step_is_saved_once_and_after_its_validation(tmp_path: Path, every: int, validate: int) -> None:
    saves = Saves()
    recipe = tiny_recipe(steps=7, checkpoint_every_steps=every, validate_every_steps=validate, keep_checkpoints=9)
    fit(tmp_path, recipe, extra=[saves])
    due = sorted({*range(every, 8, every), 7})
    assert saves.seen == [(step, step // validate) for step in due]
    found = complete_checkpoints(tmp_path / "checkpoints")
    assert [checkpoint.step for checkpoint in found] == due
    for checkpoint in found:
        assert ("val/mean_acceptance_length" in checkpoint.manifest.metrics) == (checkpoint.step % validate == 0)
        assert checkpoint.manifest.tokens == checkpoint.step * 64
        assert checkpoint.manifest.layers == LAYERS
        assert read_state(checkpoint.path)["global_step"] == checkpoint.step


LENGTHS = {1: 1.5, 2: 2.5, 3: 2.0, 4: math.nan, 5: 1.0, 6: 2.2}


def test_the_best_is_chosen_by_accepted_length_and_kept(tmp_path: Path) -> None:
    recipe = tiny_recipe(validate_every_steps=1, checkpoint_every_steps=1)
    trainer, _ = fit(tmp_path, recipe, module=TinyModule(recipe, LENGTHS.__getitem__))
    folder = tmp_path / "checkpoints"
    assert [checkpoint.step for checkpoint in complete_checkpoints(folder)] == [2, 5, 6]
    assert read_pointer(folder, "best") == folder / "step-00000002"
    assert read_pointer(folder, "last") == folder / "step-00000006"
    best = checkpoints_of(trainer).best
    assert best is not None
    assert (best.step, best.mean_acceptance_length) == (2, 2.5)


def test_the_best_so_far_is_known_after_a_resume(tmp_path: Path) -> None:
    recipe = tiny_recipe(validate_every_steps=1, checkpoint_every_steps=1)
    fit(tmp_path, recipe, module=TinyModule(recipe, LENGTHS.__getitem__), until=4)
    (tmp_path / "checkpoints" / "best").unlink()  # only a hint
    fit(tmp_path, recipe, module=TinyModule(recipe, LENGTHS.__getitem__))
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path / "checkpoints")] == [2, 5, 6]


def test_the_first_step_of_an_untrained_model_is_not_the_best(tmp_path: Path) -> None:
    recipe = tiny_recipe(validate_every_steps=1, checkpoint_every_steps=1, steps=4)
    figures = {1: (4.0, 3.0), 2: (1.5, 2.0), 3: (2.0, 1.95), 4: (1.8, 1.9)}
    module = TinyModule(recipe)
    module.figures = lambda split, losses, step: {  # type: ignore[method-assign]
        f"{split}/mean_acceptance_length": figures[step][0],
        f"{split}/loss_1": figures[step][1],
    }
    trainer, _ = fit(tmp_path, recipe, module=module)
    best = checkpoints_of(trainer).best
    assert best is not None
    assert best.step == 3
    assert read_pointer(tmp_path / "checkpoints", "best") == tmp_path / "checkpoints" / "step-00000003"


def test_figures_that_are_not_finite_leave_a_checkpoint_readable(tmp_path: Path) -> None:
    recipe = tiny_recipe(validate_every_steps=2)
    fit(tmp_path, recipe, module=TinyModule(recipe, lambda step: math.nan))
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path / "checkpoints")] == [4, 6]
    assert "val/mean_acceptance_length" not in complete_checkpoints(tmp_path / "checkpoints")[0].manifest.metrics


@pytest.mark.parametrize(
    ("stop", "validate"),
    [
        pytest.param(stop, validate, marks=pytest.mark.slow if (stop + number) % 4 else ())
        for stop in range(1, 6)
        for number, validate in enumerate((1, 2, 3, 100))
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, stop: int, validate: int) -> None:
    recipe = tiny_recipe(validate_every_steps=validate)
    _, whole = fit(tmp_path / "whole", recipe)
    _, first = fit(tmp_path / "cut", recipe, until=stop)
    trainer, second = fit(tmp_path / "cut", recipe, seed=99)
    assert first.seen + second.seen == whole.seen
    assert [batch_idx for _, batch_idx, _ in second.seen] == list(range(stop, 6))
    assert first.num_validations + second.num_validations == whole.num_validations
    assert all(map(torch.equal, weights(second), weights(whole)))
    assert trainer.global_step == 6
    assert trainer.fit_loop.total_batch_idx == 5


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    _, whole = fit(tmp_path / "whole", tiny_recipe(steps=9))
    fit(tmp_path / "cut", tiny_recipe(steps=6))
    _, longer = fit(tmp_path / "cut", tiny_recipe(steps=9))
    assert [step for step, _, _ in longer.seen] == [6, 7, 8]
    assert all(map(torch.equal, weights(longer), weights(whole)))


def test_a_finished_run_is_left_alone(tmp_path: Path) -> None:
    fit(tmp_path, tiny_recipe())
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    _, again = fit(tmp_path, tiny_recipe())
    assert again.seen == []
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def test_all_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw(folder: Path, **options: Any) -> list[float]:
        draws = Draws()
        fit(folder, tiny_recipe(), extra=[draws], **options)
        return draws.drawn

    random.seed(1)
    np.random.seed(1)
    whole = draw(tmp_path / "whole")
    random.seed(1)
    np.random.seed(1)
    first = draw(tmp_path / "cut", until=3)
    random.seed(2)
    np.random.seed(2)
    assert first + draw(tmp_path / "cut") == whole


def test_time_spent_saving_adds_up_over_attempts(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, tiny_recipe(), until=4)
    earlier_s = checkpoints_of(trainer).seconds_saving
    assert earlier_s > 0
    # The last save's own time is not in the checkpoint that it made.
    saved_s = read_state(tmp_path / "checkpoints" / "step-00000004")["callbacks"]["Checkpoints"]["seconds_saving"]
    trainer, _ = fit(tmp_path, tiny_recipe())
    assert 0 < saved_s < earlier_s
    assert checkpoints_of(trainer).seconds_saving > saved_s


def test_leftovers_of_a_kill_are_cleared_at_the_start(tmp_path: Path) -> None:
    partial = tmp_path / "checkpoints" / "step-00000002.partial"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    fit(tmp_path, tiny_recipe(), until=1)
    assert not partial.exists()


def test_a_module_without_metrics_can_be_saved(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    module = TinyModule(recipe)
    module.figures = lambda *args: {}  # type: ignore[method-assign]
    trainer, _ = fit(tmp_path, recipe, module=module)
    assert checkpoints_of(trainer).best is None
    assert newest_complete(tmp_path / "checkpoints") is not None


TRAIN = """
import pathlib, sys
from tests.training.callbacks.test_checkpoints import train_as_asked

train_as_asked(pathlib.Path(sys.argv[1]))
"""


def train_as_asked(place: Path) -> None:
    """Train in this process what a file asks for, and write what there is to tell beside it."""
    torch.set_num_threads(1)
    folder, recipe, deed = pickle.loads((place / "asked").read_bytes())
    module = TinyModule(recipe)
    if deed:
        module.on_step = deed
    told: Any
    try:
        fit(folder, recipe, module=module)
    except CheckpointError as error:
        told = error.expected, error.found, error.hint
    else:
        told = module.seen, [weight.numpy() for weight in weights(module)]
    (place / "told").write_bytes(pickle.dumps(told))


def train_in_new_process(folder: Path, recipe: Recipe, deed: Callable[[int], None] | None = None) -> Any:
    """Train in a process of its own; None if it was killed."""
    with TemporaryDirectory() as place:
        told = Path(place, "told")
        Path(place, "asked").write_bytes(pickle.dumps((folder, recipe, deed)))
        done = warm.run(place, cwd=ROOT, code=TRAIN, timeout=120)
        assert done.returncode == (0 if told.exists() else -signal.SIGKILL), done.stderr
        return pickle.loads(told.read_bytes()) if told.exists() else None


class KillAt:
    """Kill this process in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, step: int) -> None:
        if step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_killed_and_resumed_in_new_processes_equals_uninterrupted(tmp_path: Path) -> None:
    recipe = tiny_recipe(steps=12, checkpoint_every_steps=3, validate_every_steps=2)
    whole_seen, whole_weights = train_in_new_process(tmp_path / "whole", recipe)
    for kill_at in (2, 5, 9, 12):
        assert train_in_new_process(tmp_path / "cut", recipe, KillAt(kill_at)) is None
    seen, last_weights = train_in_new_process(tmp_path / "cut", recipe)
    assert seen == whole_seen[9:], "the last kill was in step 12, the last checkpoint is of step 9"
    assert all(map(np.array_equal, last_weights, whole_weights))
    for name in ("metrics.csv", "checkpoints/last", "checkpoints/best"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


class LimitFileSize:
    """From one step on, let no file grow beyond the size of the tensors beside weights and optimizer."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, step: int) -> None:
        if step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))


def test_a_refused_write_stops_training_with_the_earlier_checkpoint_intact(tmp_path: Path) -> None:
    recipe = tiny_recipe().model_copy(update={"logging": LoggingSection(loggers=[])})  # events would fail first
    expected, found, hint = train_in_new_process(tmp_path, recipe, LimitFileSize(3))
    assert "checkpoint of step 4" in expected
    assert "File too large" in found
    assert "step-00000002 is complete" in hint
    newest = newest_complete(tmp_path / "checkpoints")
    assert newest is not None
    assert newest.step == 2
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    assert len(fit(tmp_path, recipe)[1].seen) == 4


class Clock:
    """Stands still but for `step_s` seconds in each step."""

    def __init__(self, step_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self._step_s = 1000.0, step_s
        monkeypatch.setattr("mtp_lightning.training.saving.save_checkpoints.time.monotonic", lambda: self.now)

    def __call__(self, step: int) -> None:
        self.now += self._step_s


@pytest.mark.parametrize(
    ("section", "kept"),
    [
        ({"every_steps": None}, [12]),
        ({"every_steps": None, "every_minutes": 1.0}, [4, 8, 12]),  # three steps of 25 s, seen in the step after
        ({"every_steps": 6, "every_minutes": 1.0}, [4, 6, 10, 12]),  # each save starts the clock anew
        ({"every_steps": 4, "keep_every_steps": 5, "keep": 2}, [5, 10, 12]),
        ({"every_steps": None, "every_minutes": 0.001, "keep_every_steps": 4, "keep": 2}, [4, 8, 10, 12]),
    ],
)
def test_steps_are_saved_by_the_clock_and_kept_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: dict[str, Any], kept: list[int]
) -> None:
    assert saved_steps(tmp_path, monkeypatch, section, 12) == kept


def test_what_is_kept_for_ever_outlives_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"every_steps": 1, "keep_every_steps": 3, "keep": 2}
    assert saved_steps(tmp_path, monkeypatch, section, 7) == [3, 6, 7]
    assert saved_steps(tmp_path, monkeypatch, section, 12) == [3, 6, 9, 11, 12]


def saved_steps(folder: Path, monkeypatch: pytest.MonkeyPatch, section: dict[str, Any], until: int) -> list[int]:
    """Train on to a step, each step of 25 s, and return which checkpoints there are."""
    recipe = tiny_recipe(steps=12, validate_every_steps=100, keep_checkpoints=99, checkpoint=section)
    module = TinyModule(recipe)
    module.on_step = Clock(25.0, monkeypatch)
    fit(folder, recipe, module=module, until=until)
    return [checkpoint.step for checkpoint in complete_checkpoints(folder / "checkpoints")]


def test_a_run_saved_by_the_clock_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def module_of(seed: int) -> TinyModule:
        torch.manual_seed(seed)
        return TinyModule(recipe)

    recipe = tiny_recipe(steps=9, checkpoint={"every_steps": None, "every_minutes": 1.0})
    _, whole = fit(tmp_path / "whole", recipe, module=module_of(0))
    clock, cut = Clock(25.0, monkeypatch), module_of(0)

    def step_or_stop(step: int) -> None:
        clock(step)
        if step == 6:
            raise Stop

    cut.on_step = step_or_stop
    with pytest.raises(Stop):
        fit(tmp_path / "cut", recipe, module=cut)
    newest = newest_complete(tmp_path / "cut/checkpoints")
    assert newest is not None
    assert newest.step == 4
    _, resumed = fit(tmp_path / "cut", recipe, seed=99)
    assert resumed.seen == whole.seen[4:]
    assert all(map(torch.equal, weights(resumed), weights(whole)))
