import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from mtp_lightning.training.logging.curves import build_figure, draw_training_curves
from mtp_lightning.training.logging.metrics_files import read_rows
from tests.training.callbacks.tiny_run import TinyModule, fit, tiny_recipe


def summary_of(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "summary.json").read_text())
    assert isinstance(content, dict)
    return content


def test_the_summary_tells_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, tiny_recipe(seed=5), summary=True)
    content = summary_of(tmp_path)
    last = read_rows(tmp_path / "metrics.csv")[-1]
    validation = content["validation"]
    assert validation["step"] == 6
    assert validation["loss"] == {str(k): last[f"val/loss_{k}"] for k in (1, 2, 3)}
    assert validation["bits"]["2"] == pytest.approx(last["val/loss_2"] / math.log(2))
    assert validation["acceptance_rate"] == {str(k): last[f"val/acceptance_rate_{k}"] for k in (2, 3)}
    assert validation["mean_acceptance_length"] == last["val/mean_acceptance_length"]
    assert content["training"]["loss"]["1"] == last["train/loss_1"]
    assert content["best_checkpoint"]["name"] in ("step-00000006", "step-00000004")
    assert content["last_checkpoint"] == "step-00000006"
    assert content["is_finished"]
    expected = {"recipe": "tiny", "seed": 5, "steps": 6, "tokens": 384, "num_offsets": 3, "bits_unit": "bits/byte"}
    assert {key: content[key] for key in expected} == expected
    assert 0 < content["checkpoints_s"] < content["wall_s"]["attempt"] == content["wall_s"]["total"]
    out = capsys.readouterr().out
    assert "tiny: finished after 6 steps, 384 tokens" in out
    assert f"expected acceptance length  {last['val/mean_acceptance_length']:.3f}" in out
    assert imread(tmp_path / "curves.png").shape[:2] == (500, 1200)


def test_time_adds_up_over_attempts(tmp_path: Path) -> None:
    fit(tmp_path, tiny_recipe(), until=4, summary=True)
    first_s = summary_of(tmp_path)["wall_s"]["attempt"]
    fit(tmp_path, tiny_recipe(), summary=True)
    wall_s = summary_of(tmp_path)["wall_s"]
    assert wall_s["attempt"] < wall_s["total"] < wall_s["attempt"] + first_s


def test_a_run_without_validation_or_acceptance_has_a_summary(tmp_path: Path) -> None:
    fit(tmp_path, tiny_recipe(1, validate_every_steps=100), summary=True)
    content = summary_of(tmp_path)
    assert content["validation"] is None
    assert content["best_checkpoint"] is None
    assert content["training"]["loss"].keys() == {"1"}
    assert (tmp_path / "curves.png").exists()


def test_figures_that_are_not_finite_become_null(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    fit(tmp_path, recipe, module=TinyModule(recipe, lambda step: math.nan), summary=True)
    assert summary_of(tmp_path)["validation"]["mean_acceptance_length"] is None


def stop_at(folder: Path, step_to_stop: int, stop: Any) -> None:
    recipe = tiny_recipe()
    module = TinyModule(recipe)
    module.on_step = lambda step: stop() if step == step_to_stop else None
    fit(folder, recipe, module=module, summary=True)


def test_an_interrupted_run_has_a_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit):
        stop_at(tmp_path, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
    content = summary_of(tmp_path)
    assert (content["is_finished"], content["steps"], content["last_checkpoint"]) == (False, 3, "step-00000003")
    assert content["validation"]["step"] == 3
    assert (tmp_path / "curves.png").exists()
    assert "tiny: interrupted after 3 steps" in capsys.readouterr().out


def fail() -> None:
    raise ZeroDivisionError


def test_a_failed_run_leaves_a_file_and_the_screen_to_the_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ZeroDivisionError):
        stop_at(tmp_path, 3, fail)
    assert summary_of(tmp_path)["last_checkpoint"] == "step-00000002"
    assert "interrupted" not in capsys.readouterr().out


def test_a_failure_before_training_keeps_the_earlier_summary(tmp_path: Path) -> None:
    fit(tmp_path, tiny_recipe(), until=4, summary=True)
    before = summary_of(tmp_path)
    recipe = tiny_recipe()
    module = TinyModule(recipe)
    module.configure_optimizers = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, recipe, module=module, summary=True)
    assert summary_of(tmp_path) == before


ROWS: list[dict[str, int | float]] = [
    {
        "step": 10,
        "train/loss_1": 3.0,
        "train/loss_2": 4.0,
        "train/acceptance_rate_2": 0.25,
        "train/mean_acceptance_length": 1.25,
    },
    {
        "step": 20,
        "val/loss_1": 2.0,
        "val/loss_2": math.nan,
        "val/acceptance_rate_2": 0.5,
        "val/mean_acceptance_length": 1.5,
    },
]


def points_of(axes: Any) -> list[list[tuple[float, float]]]:
    lines = (list(zip(*map(list, line.get_data()), strict=True)) for line in axes.get_lines())
    return [points for points in lines if points]


def test_the_picture_shows_every_figure(tmp_path: Path) -> None:
    left, right, lengths = build_figure(ROWS, title="tiny", unit="nats per byte").axes
    assert points_of(left) == [[(10, 3.0)], [(20, 2.0)], [(10, 4.0)]]
    assert points_of(right) == [[(10, 0.25)], [(20, 0.5)]]
    assert points_of(lengths) == [[(10, 1.25)], [(20, 1.5)]]
    assert left.get_ylabel() == "loss (nats per byte)"
    assert left.get_xlabel() == right.get_xlabel() == "step"
    assert "tokens per forward" in lengths.get_ylabel()


def test_training_is_light_and_validation_dark() -> None:
    train, validation = build_figure(ROWS, title="", unit="").axes[0].get_lines()[:2]
    assert train.get_color() == validation.get_color()
    assert train.get_alpha() < 0.5
    assert validation.get_alpha() is None
    assert validation.get_linewidth() > train.get_linewidth()


@pytest.mark.parametrize("rows", [[], ROWS[:1], ROWS[1:], [{"step": 1, "train/loss_1": 1.0}]])
def test_the_picture_survives_missing_figures(tmp_path: Path, rows: list[dict[str, int | float]]) -> None:
    names = sorted({name for row in rows for name in row}, key="step".__ne__)
    lines = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    (tmp_path / "metrics.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    draw_training_curves(tmp_path / "metrics.csv", tmp_path / "new" / "curves.png")
    assert imread(tmp_path / "new" / "curves.png").shape[:2] == (500, 1200)
