import os
import signal
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer

from mtp_lightning.checkpoint.format.folder import complete_checkpoints
from tests.training.callbacks.tiny_run import TinyModule, fit, tiny_recipe


@pytest.fixture(autouse=True)
def _default_handler() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupt(folder: Path, signals: int) -> TinyModule:
    recipe = tiny_recipe(checkpoint_every_steps=100, log_every_steps=100)
    module = TinyModule(recipe)

    def press(step: int) -> None:
        if step == 3:
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGINT)

    module.on_step = press
    with pytest.raises(SystemExit):
        fit(folder, recipe, module=module)
    return module


def test_ctrl_c_saves_the_step_and_the_run_goes_on_from_there(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    module = interrupt(tmp_path, signals=1)
    assert len(module.seen) == 3
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path / "checkpoints")] == [3]
    assert "Ctrl-C again stops at once" in capfd.readouterr().err
    _, resumed = fit(tmp_path, tiny_recipe(checkpoint_every_steps=100, log_every_steps=100))
    assert [step for step, _, _ in resumed.seen] == [3, 4, 5]


def test_a_due_step_is_saved_once_even_if_ctrl_c_comes_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    monkeypatch.setattr(Trainer, "save_checkpoint", recorder(saved, Trainer.save_checkpoint))
    recipe = tiny_recipe(checkpoint_every_steps=3)
    module = TinyModule(recipe)
    module.on_step = lambda step: os.kill(os.getpid(), signal.SIGINT) if step == 3 else None
    with pytest.raises(SystemExit):
        fit(tmp_path, recipe, module=module)
    assert saved == [3]


def recorder(saved: list[int], function: Any) -> Any:
    def save_checkpoint(trainer: Trainer, *args: Any) -> None:
        saved.append(trainer.global_step)
        function(trainer, *args)

    return save_checkpoint


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    interrupt(tmp_path, signals=2)
    assert complete_checkpoints(tmp_path / "checkpoints") == []


def test_ctrl_c_is_given_back_after_training(tmp_path: Path) -> None:
    fit(tmp_path, tiny_recipe())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
