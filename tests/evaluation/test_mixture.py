"""What heads have learnt to read: the table and the picture show the softmax of the stored weights."""

import pytest
import torch
from typer.testing import CliRunner

from mtp_lightning.checkpoint.convert.consolidate import consolidate
from mtp_lightning.cli.app import app
from mtp_lightning.errors import CheckpointError, RunFolderError
from mtp_lightning.evaluation.lens import read_mixtures
from tests.checkpoint.runs import save_run
from tests.support.tiny import tiny_model, tiny_recipe


def save(folder, adapt):
    recipe = tiny_recipe(model={"num_hidden_layers": 9}, adapt=adapt)
    model = tiny_model(recipe).float()
    save_run(folder, recipe, 1, model=model)
    return model


def test_shares_are_the_softmax_of_the_weights(tmp_path):
    model = save(tmp_path / "run", {"layer_mix": {"temperature": 0.2, "main_head": False}})
    consolidate(tmp_path / "run", tmp_path / "out")
    for folder in ("run", "out"):
        mixtures = read_mixtures(tmp_path / folder)
        assert [mixture.offset for mixture in mixtures] == [2, 3, 4]
        for mixture in mixtures:
            expected = torch.softmax(model.layer_mix[str(mixture.offset)].weight.double() / 0.2, 0)
            assert mixture.shares == pytest.approx(expected.tolist(), rel=1e-6)
            assert len(mixture.shares) == 5
            assert 1 < mixture.depth < 5


def test_the_verb_shows_and_draws(tmp_path):
    save(tmp_path / "run", {"layer_mix": {}})
    done = CliRunner().invoke(app, ["report", "mixture", str(tmp_path / "run"), "--plot", str(tmp_path / "a.png")])
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.output.splitlines() if "%" in line]
    shares = [[float(cell.rstrip("%")) for cell in row[2:]] for row in rows]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert all(abs(sum(row) - 100) < 0.5 for row in shares)
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_a_picture_that_cannot_be_written_says_so(tmp_path):
    save(tmp_path / "run", {"layer_mix": {}})
    (tmp_path / "file").write_text("")
    place = tmp_path / "file/mixture.png"
    done = CliRunner().invoke(app, ["report", "mixture", str(tmp_path / "run"), "--plot", str(place)])
    assert done.exit_code == RunFolderError.exit_code
    assert str(place) in done.stderr
    assert "Give another path to --plot" in done.stderr


def test_a_run_without_mixtures_is_refused(tmp_path):
    save(tmp_path / "run", {})
    with pytest.raises(CheckpointError, match=r"adapt\.layer_mix"):
        read_mixtures(tmp_path / "run")
