"""`mtp bench memory`, from the recipe to table and JSON."""

import json

import pytest

from mtp_lightning.bench.training import memory
from mtp_lightning.bench.training.cells import build_cells
from mtp_lightning.bench.training.memory import bench_memory, memory_figures, run_probe
from tests.bench.shapes import quick_recipe


@pytest.mark.slow
def test_table_and_json(capsys, tmp_path):
    path = tmp_path / "figures" / "memory.json"
    recipe = quick_recipe()
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"vocab_size": 20_000})})
    bench_memory(recipe, offsets=[1, 8], backward_orders=["sequential"], json_path=path)
    shown = capsys.readouterr()
    assert "n=8 is not possible" in shown.out
    assert "V=20,000, D=32, T=16, 4 rows in micro-batches of 2, fp32, parallel heads" in shown.out
    assert "0/1 done, now n=1 sequential" in shown.err
    written = json.loads(path.read_text())
    (figure,) = written["figures"]
    assert figure["num_offsets"] == 1
    assert figure["ratio_to_one_offset"] == 1
    assert figure["peak_bytes"] > 0.75 * figure["state_bytes"] > 10 * 2**20
    assert written["machine"]["device"] == "cpu"
    assert written["recipe"]["name"] == "quick"


def test_ratios():
    cells = build_cells(quick_recipe(kind="linear"), [1, 2], ["sequential", "joint"])
    peaks = {(1, "sequential"): 100, (1, "joint"): 200, (2, "sequential"): 110, (2, "joint"): 400}
    figures = memory_figures(cells, {key: {"peak_bytes": peak} for key, peak in peaks.items()})
    assert [figure.ratio_to_one_offset for figure in figures] == [1, 1, 1.1, 2]
    assert [figure.ratio_to_joint for figure in figures] == [0.5, 1, 0.275, 1]


@pytest.mark.parametrize("columns", [80, 120])
def test_table_fits_the_terminal(columns, monkeypatch, capsys):
    cells = build_cells(quick_recipe(kind="linear"), [1, 8], ["sequential", "bridged", "joint"])
    figures = memory_figures(cells, {cell.key: {"peak_bytes": 123_456 * 2**20} for cell in cells})
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = memory.console()
    screen.width = columns
    screen.print(memory.memory_table(figures))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)


@pytest.mark.slow
def test_a_probe_that_fails_says_why():
    recipe = quick_recipe()
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"device": "cuda"})})
    if "failure" not in (result := run_probe(recipe)):
        pytest.skip("there is a CUDA device")
    assert result["failure"].startswith("run.device=cuda needs a CUDA device")


def test_failures_are_shown_not_raised(monkeypatch, capsys):
    monkeypatch.setattr(memory, "run_probe", lambda recipe: {"failure": "killed by signal 9"})
    bench_memory(quick_recipe(), offsets=[1], backward_orders=["joint"], json_path=None)
    assert "n=1 joint failed: killed by signal 9" in capsys.readouterr().out
