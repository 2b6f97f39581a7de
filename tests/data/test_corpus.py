import os
from pathlib import Path
from typing import Any

import pytest

from mtp_lightning.data.loading import corpus as corpus_module
from mtp_lightning.data.loading.corpus import prepare_shards, shards_folder
from mtp_lightning.data.loading.factory import open_rows
from mtp_lightning.data.shards.verify import verify_shards
from mtp_lightning.errors import DataError
from tests.data.corpora import build_tiny, tiny_recipe


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_corpus_is_built_once_into_the_cache(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(tmp_path / "cache", corpus)
    folder = prepare_shards(recipe)
    assert folder == shards_folder(recipe)
    assert folder.parent == tmp_path / "cache"
    assert len(folder.name) == len("data-") + 12
    first = capsys.readouterr()
    assert first.err.startswith(f"building shards {folder} from {corpus}\n")
    assert first.out.startswith("built ")
    written_at = (folder / "manifest.json").stat().st_mtime_ns
    assert prepare_shards(recipe) == folder
    assert (folder / "manifest.json").stat().st_mtime_ns == written_at
    (second,) = lines_of(capsys)
    assert second.startswith(f"using shards {folder}: ")
    verify_shards(folder)


def test_run_goes_on_with_the_text_it_began_with_and_says_so(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tmp_path / "cache", corpus)
    folder = prepare_shards(recipe)
    fingerprint = open_rows(recipe, "train").manifests[0].fingerprint
    file = next(corpus.rglob("*.txt"))
    file.write_bytes(file.read_bytes()[::-1])
    os.utime(file, (2e9, 2e9))
    lines_of(capsys)
    prepare_shards(recipe)
    assert f"its corpus has changed since (1 newer files); to use it, remove {folder}" in lines_of(capsys)[-1]
    (corpus / "new.txt").write_text("more")
    os.utime(corpus / "new.txt", (1, 1))
    os.utime(file, (1, 1))
    prepare_shards(recipe)
    assert "its corpus has changed since (0 newer files)" in lines_of(capsys)[-1]
    assert open_rows(recipe, "train").manifests[0].fingerprint == fingerprint


def test_shards_outlive_their_corpus(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny_recipe(tmp_path / "cache", corpus)
    prepare_shards(recipe)
    corpus.rename(tmp_path / "elsewhere")
    prepare_shards(recipe)
    assert "cannot be found any more: no file or folder" in lines_of(capsys)[-1]
    assert len(open_rows(recipe, "train")) > 0


@pytest.mark.parametrize(
    "changes",
    [{"data": {"validation_fraction": 0.4}}, {"data": {"corpus": ["stdlib:json"]}}, {"data": {"corpus": ["stdlib"]}}],
)
def test_what_decides_the_tokens_decides_the_folder(tmp_path: Path, corpus: Path, changes: dict[str, Any]) -> None:
    base = tiny_recipe(tmp_path, corpus)
    assert shards_folder(tiny_recipe(tmp_path, corpus, **changes)) != shards_folder(base)


def test_what_does_not_decide_the_tokens_does_not(tmp_path: Path, corpus: Path) -> None:
    base = tiny_recipe(tmp_path, corpus)
    other = tiny_recipe(tmp_path, corpus, data={"seq_len": 99}, run={"seed": 9}, heads={"num_offsets": 1})
    assert shards_folder(other) == shards_folder(base)


def test_standard_library_of_another_python_has_another_folder(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdlib = tiny_recipe(tmp_path, corpus, data={"corpus": ["stdlib:json"]})
    files = tiny_recipe(tmp_path, corpus)
    before = shards_folder(stdlib), shards_folder(files)
    monkeypatch.setattr(corpus_module.platform, "python_version", lambda: "4.0.0")
    assert shards_folder(stdlib) != before[0]
    assert shards_folder(files) == before[1]


def test_relative_corpus_means_the_folder_it_is_read_from(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(tmp_path, Path("corpus"))
    monkeypatch.chdir(tmp_path)
    here = shards_folder(recipe)
    assert here == shards_folder(tiny_recipe(tmp_path, corpus))
    monkeypatch.chdir(corpus)
    assert shards_folder(recipe) != here


def test_shards_that_are_named_are_used_and_never_built(tmp_path: Path, corpus: Path) -> None:
    named = tiny_recipe(tmp_path / "cache", corpus, data={"shards": str(tmp_path / "shards")})
    with pytest.raises(DataError, match=r"must have its manifest, .* found no such folder"):
        prepare_shards(named)
    build_tiny([str(corpus)], tmp_path / "shards")
    assert prepare_shards(named) == tmp_path / "shards"
    assert not (tmp_path / "cache").exists()


def test_folder_without_manifest_is_not_mistaken_for_shards(tmp_path: Path, corpus: Path) -> None:
    recipe = tiny_recipe(tmp_path / "cache", corpus)
    (prepare_shards(recipe) / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"must be new or empty; found a folder with 3 entries.* or move that away"):
        prepare_shards(recipe)


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(tmp_path / "cache", corpus, data={"shards": str(tmp_path / "shards")})
    build_tiny([str(corpus)], tmp_path / "shards")
    tokenizer = type(corpus_module.open_tokenizer("byte"))
    monkeypatch.setattr(tokenizer, "fingerprint", lambda self: "0" * 64)
    with pytest.raises(
        DataError, match=r"must be the tokenizer that the shards were made with, byte .* found byte 000"
    ):
        open_rows(recipe, "train")


def test_vocabulary_smaller_than_a_token_id_is_refused(tmp_path: Path, corpus: Path) -> None:
    recipe = tiny_recipe(tmp_path / "cache", corpus, model={"vocab_size": 256})
    with pytest.raises(DataError, match=r"model\.vocab_size = 256; found id 256 in the tokenizer byte\. Raise .*257"):
        prepare_shards(recipe)
    prepare_shards(tiny_recipe(tmp_path / "cache", corpus))
    with pytest.raises(DataError, match=r"below model\.vocab_size = 256; found id 256 in the shards .*Raise .* to 257"):
        open_rows(recipe, "train")
