"""`mtp bench train`, from the recipe to table and JSON."""

import json

import pytest
import torch

from mtp_lightning.bench.training import rounds, speed
from mtp_lightning.bench.training.cells import build_cells
from mtp_lightning.bench.training.rounds import Timings, time_rounds
from mtp_lightning.bench.training.speed import bench_train, speed_figure, speed_table
from mtp_lightning.errors import RunFolderError, TrainingError
from mtp_lightning.planner.flops import flops_per_step
from tests.bench.shapes import quick_recipe

ALL = ["sequential", "bridged", "joint"]


def test_table_and_json(capsys, tmp_path):
    path = tmp_path / "train.json"
    recipe = quick_recipe(num_offsets=2)
    bench_train(recipe, offsets=[1, 2, 4], backward_orders=ALL, json_path=path, rounds=2)
    shown = capsys.readouterr()
    assert "n=4 is not possible" in shown.out
    assert "matmul" in shown.out
    assert "MFU" not in shown.out
    written = json.loads(path.read_text())
    figures = {(figure["num_offsets"], figure["backward_order"]): figure for figure in written["figures"]}
    assert set(figures) == {(n, backward_order) for n in (1, 2) for backward_order in ALL}
    assert figures[1, "bridged"]["time_ratio"] == 1
    assert figures[2, "bridged"]["flops_per_step"] == flops_per_step(recipe)
    assert all(len(figure["samples_s"]) == 2 for figure in figures.values())
    assert all(figure["tokens_per_s"] * figure["step_s"] == pytest.approx(64) for figure in figures.values())
    assert written["peak_is"] == "measured matrix product"


@pytest.mark.parametrize(("kind", "is_said"), [("recursive", True), ("parallel", False)])
def test_what_is_computed_twice_is_said(kind, is_said, capsys):
    bench_train(quick_recipe(kind=kind), offsets=[2], backward_orders=["bridged"], json_path=None, rounds=1)
    assert ("Activations of the heads are computed twice" in capsys.readouterr().out) == is_said


def test_rounds_are_interleaved(monkeypatch):
    order = []

    def record(step, backward_order):
        order.append((step.recipe.heads.num_offsets, backward_order))
        return 1.0

    monkeypatch.setattr(rounds, "step_seconds", record)
    cells = build_cells(quick_recipe(kind="linear"), [1, 2], ["sequential", "joint"])
    timings = time_rounds(cells, torch.device("cpu"), 2)
    once = [(1, "sequential"), (2, "sequential"), (1, "joint"), (2, "joint")]
    assert order == once + once[::-1]
    assert all(len(samples) == 2 for samples in timings.step_s.values())
    assert len(timings.product_flops_per_s) == 2


def test_ratios_are_taken_within_a_round():
    """A machine that was twice as slow in one of three rounds changes no ratio."""
    cells = build_cells(quick_recipe(kind="linear"), [1, 2], ["sequential", "joint"])
    timings = Timings()
    for cell, seconds in zip(cells, (1.0, 2.0, 1.5, 3.0), strict=True):
        timings.step_s[cell.key] = [seconds, 2 * seconds, 1.01 * seconds]
    figure = speed_figure(cells[2], timings, peak=None)
    assert figure.time_ratio == pytest.approx(1.5)
    assert figure.ratio_to_joint == pytest.approx(0.5)
    assert figure.time_over_flops == pytest.approx(1.5 / figure.flop_ratio)
    assert figure.peak_share is None


def test_no_base_no_ratio():
    cells = build_cells(quick_recipe(), [2], ["sequential"])
    timings = Timings()
    timings.step_s[cells[0].key] = [1.0]
    figure = speed_figure(cells[0], timings, peak=1e12)
    assert (figure.time_ratio, figure.time_over_flops, figure.ratio_to_joint) == (None, None, None)


@pytest.mark.parametrize("on_cuda", [False, True])
def test_table_fits_80_columns(on_cuda, capsys):
    cells = build_cells(quick_recipe(kind="linear"), [1, 8], ALL)
    timings = Timings()
    for cell in cells:
        timings.step_s[cell.key] = [0.1234]
        timings.peak_bytes[cell.key] = 70 * 2**30
    screen = speed.console()
    screen.width = 80
    screen.print(speed_table([speed_figure(cell, timings, 1e9) for cell in cells], on_cuda=on_cuda))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


def test_models_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(rounds, "_available_bytes", lambda: 1000)
    with pytest.raises(TrainingError) as caught:
        time_rounds(build_cells(quick_recipe(), [1, 2], ["joint"]), torch.device("cpu"), 1)
    assert "--offsets" in caught.value.hint


def test_figures_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError) as caught:
        bench_train(
            quick_recipe(), offsets=[1], backward_orders=["joint"], json_path=tmp_path / "file" / "x.json", rounds=1
        )
    assert "--json" in caught.value.hint


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda(tmp_path, capsys):
    path = tmp_path / "train.json"
    recipe = quick_recipe()
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"device": "cuda"})})
    bench_train(recipe, offsets=[1, 2], backward_orders=ALL, json_path=path, rounds=2)
    figures = json.loads(path.read_text())["figures"]
    assert all(figure["peak_bytes"] > 0 for figure in figures)
    assert "GiB" in capsys.readouterr().out
