"""What a run could only fail of at its end is told before its first step, or does not fail it."""

from pathlib import Path

import pytest

from mtp_lightning.errors import DataError, RunFolderError
from mtp_lightning.recipe import LoadedRecipe, load_recipe
from mtp_lightning.training.fit import train
from mtp_lightning.training.logging.curves import draw_training_curves

RECIPE = Path(__file__).parents[2] / "recipes/debug/parallel.yaml"


@pytest.mark.parametrize(("letters", "is_refused"), [(64, True), (300, True), (63, False)])
def test_a_sample_that_leaves_no_room_is_refused(letters: int, is_refused: bool, tmp_path: Path) -> None:
    fields = ["model.max_position_embeddings=64", "data.seq_len=32", f"run.sample={'x' * letters}", "run.steps=1"]
    loaded = load_recipe(RECIPE, [*fields, f"run.dir={tmp_path}/run", f"run.cache={tmp_path}/cache", "run.device=cpu"])
    if not is_refused:
        assert train(loaded) == 0
        return
    with pytest.raises(DataError, match=rf"leave room in the 64 positions .* {letters} tokens"):
        train(loaded)
    assert not list((tmp_path / "run/checkpoints").glob("step-*"))


@pytest.mark.parametrize("title", ["costs $5^ and $6_", "100 % \\frac{", "_^{}"])
def test_a_picture_takes_any_name(title: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss_1,val/loss_1\n1,2.0,2.0\n2,1.0,1.0\n")
    draw_training_curves(tmp_path / "metrics.csv", tmp_path / "curves.png", title=title)
    assert (tmp_path / "curves.png").stat().st_size > 1000


def small(folder: Path, *fields: str) -> LoadedRecipe:
    own = ["run.steps=1", f"run.dir={folder}/run", f"run.cache={folder}/cache", "run.device=cpu", "optimizer.lr=1e-3"]
    return load_recipe(RECIPE, [*own, *fields])


def test_another_learning_rate_is_refused_with_the_way_there_is(tmp_path: Path) -> None:
    assert train(small(tmp_path)) == 0
    with pytest.raises(RunFolderError) as caught:
        train(small(tmp_path, "optimizer.lr=2e-3", "run.steps=2"))
    assert "init.optimizer=true" in caught.value.hint
    way = ("optimizer.lr=2e-3", f"run.dir={tmp_path}/other", f"init.path={tmp_path}/run", "init.optimizer=true")
    assert train(small(tmp_path, *way)) == 0
    with pytest.raises(RunFolderError) as caught:
        train(small(tmp_path, "heads.num_offsets=2", "run.steps=2"))
    assert "init.optimizer" not in caught.value.hint
