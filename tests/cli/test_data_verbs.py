"""`mtp data build | peek | verify` on a corpus of a few lines."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mtp_lightning.cli.app import app
from mtp_lightning.errors import DataError


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a folder with a corpus of twenty small files, and a recipe for it."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"this is the text number {number}\n" * 3, encoding="utf-8")
    recipe = "data: {corpus: [corpus], seq_len: 8, validation_fraction: 0.2}\nrun: {cache: cache}\n"
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    return folder


def mtp(*arguments: str) -> Result:
    """Run the command."""
    return CliRunner().invoke(app, list(arguments))


def test_shards_are_built_from_paths_and_verified(corpus: Path) -> None:
    assert mtp("data", "build", "--out", "shards", "--validation-fraction", "0.2", str(corpus)).exit_code == 0
    assert mtp("data", "verify", "shards").exit_code == 0
    next(Path("shards").rglob("*.tar")).write_bytes(b"cut")
    result = mtp("data", "verify", "shards")
    assert result.exit_code == DataError.exit_code
    assert result.stderr.startswith("error: ")


def test_shards_of_a_recipe_are_built_into_its_cache_and_looked_at(corpus: Path) -> None:
    assert corpus.is_dir()
    assert mtp("data", "build", "recipe.yaml").exit_code == 0
    assert list(Path("cache").rglob("*.tar"))
    result = mtp("data", "peek", "recipe.yaml", "data.seq_len=9", "--row", "1", "--split", "validation")
    assert result.exit_code == 0
    assert "validation row 1" in result.stdout


def test_empty_corpus_is_an_error(corpus: Path) -> None:
    for file in corpus.iterdir():
        file.unlink()
    result = mtp("data", "build", "recipe.yaml")
    assert result.exit_code == DataError.exit_code
    assert len(result.stderr.splitlines()) >= 3


def test_shards_are_counted(corpus: Path) -> None:
    options = ("--out", "shards", "--validation-fraction", "0.2", "--deduplicate", "--processes", "1")
    assert mtp("data", "build", *options, str(corpus)).exit_code == 0
    result = mtp("data", "stats", "shards", "--picture", "lengths.png")
    assert result.exit_code == 0
    assert "shards" in result.stdout
    assert Path("lengths.png").stat().st_size > 1000


def test_options_for_texts_need_a_folder(corpus: Path) -> None:
    assert corpus.is_dir()
    assert "give --out" in mtp("data", "build", "recipe.yaml", "--deduplicate").stderr
