"""Heads that nobody has trained are named when a model is exported."""

from pathlib import Path

import pytest
import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.export.contents import Source
from mtp_lightning.checkpoint.export.untrained import untrained_heads
from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.checkpoint.format.folder import open_checkpoint
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.model.mtp_model import MtpModel, build_model
from mtp_lightning.recipe import Recipe
from tests.checkpoint.foreign import llama_tensors, module_tensors, write_folder
from tests.checkpoint.runs import save_run
from tests.support.covering import some_of
from tests.support.tiny import HEAD_KINDS, tiny_recipe


def untrained(path: Path) -> list[str]:
    return untrained_heads(Source(open_checkpoint(path), "fp32"))


def save(tmp_path: Path, recipe: Recipe, model: MtpModel, *, changed: tuple[int, ...]) -> Path:
    with torch.no_grad():
        for offset in changed:
            next(iter(model.heads.modules_of(offset)[0].parameters())).view(-1)[0] += 1e-3
    save_run(tmp_path / "run", recipe, 5, model=model)
    return tmp_path / "run"


@pytest.mark.parametrize("kind", some_of(["parallel", "causal", "sequential", "linear", "medusa"], one_in=2))
def test_heads_that_are_as_they_were_drawn(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(heads=HEAD_KINDS[kind])
    run = save(tmp_path, recipe, build_model(recipe), changed=(3,))
    assert untrained(run) == ["offset 2", "offset 4"]
    for name in ("trunk", "consolidated"):
        export_model(run, tmp_path / name, name)
        assert "Warning: never trained, as they began: offset 2, offset 4." in capsys.readouterr().err


@pytest.mark.parametrize("kind", some_of(HEAD_KINDS, one_in=2, first=1))
def test_trained_heads_are_not_warned_of(kind: str, tmp_path: Path) -> None:
    save_run(tmp_path / "run", tiny_recipe(heads=HEAD_KINDS[kind]), 5)
    assert untrained(tmp_path / "run") == []


def test_heads_of_an_imported_folder(tmp_path: Path) -> None:
    """Its own were trained by others; copies of the last layer were not, until a run has changed them."""
    write_folder(tmp_path / "hf", llama_tensors() | module_tensors("deepseek"), num_nextn_predict_layers=1)
    import_folder(tmp_path / "hf", tmp_path / "native", Wanted())
    assert untrained(tmp_path / "native") == []
    write_folder(tmp_path / "plain", llama_tensors())
    import_folder(tmp_path / "plain", tmp_path / "copied", Wanted(num_offsets=3, kind="parallel", init="copy"))
    assert untrained(tmp_path / "copied") == ["offset 2", "offset 3"]
    recipe, model = load_model(tmp_path / "copied")
    run = save(tmp_path, recipe, model, changed=(2,))
    assert untrained(run) == ["offset 3"]
    for path in (tmp_path / "copied").iterdir():
        path.unlink()
    assert untrained(run) == []  # nobody knows any more
