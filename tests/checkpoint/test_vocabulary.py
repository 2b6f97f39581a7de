"""Rows for tokens that a folder has no rows for: only where they are asked for, and none is lost."""

import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.huggingface import folder as folders
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.cli.app import app
from mtp_lightning.errors import CheckpointError
from tests.checkpoint.foreign import llama_tensors, write_folder
from tests.data.text_tokenizers import write_tokenizer_json

NAMES = ("model.embed_tokens.weight", "lm_head.weight")


def rows_of(folder: Path) -> dict[str, torch.Tensor]:
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    names = {"trunk.embed_tokens.weight": NAMES[0], "unembedding.lm_heads.0.weight": NAMES[1]}
    return {names[name]: one for name, one in stored.items() if name in names}


@pytest.mark.parametrize("block_bytes", [2**22, 40])  # of whole matrices, and of less than a row of 64 bytes
@pytest.mark.parametrize(("wanted", "rows"), [(13, 13), (14, 14), (40, 40), ("auto", 64)])
def test_new_rows_are_the_mean_of_the_old_ones(
    wanted: int | str, rows: int, block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "BLOCK_BYTES", block_bytes)
    import_folder(write_folder(tmp_path / "hf"), tmp_path / "ours", Wanted(vocabulary=wanted))  # type: ignore[arg-type]
    assert load_model(tmp_path / "ours")[0].model.vocab_size == rows
    matrices, stored = rows_of(tmp_path / "ours"), llama_tensors()
    assert matrices.keys() == {*NAMES}
    for name, matrix in matrices.items():
        assert torch.equal(matrix[:13], stored[name])
        torch.testing.assert_close(matrix[13:], stored[name].mean(0).expand(rows - 13, -1), rtol=1e-5, atol=1e-6)


def test_tied_rows_stay_tied(tmp_path: Path) -> None:
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    folder = write_folder(tmp_path / "hf", tensors, tie_word_embeddings=True)
    import_folder(folder, tmp_path / "ours", Wanted(vocabulary=20))
    section = load_model(tmp_path / "ours")[0].model
    assert (section.vocab_size, section.tie_word_embeddings) == (20, True)
    assert {name: one.shape for name, one in rows_of(tmp_path / "ours").items()} == {NAMES[0]: (20, 16)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["llama", "qwen2_tied", "gpt_neox"])
def test_logits_are_those_of_a_resized_model_of_transformers(case: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'mtp_lightning[judge]'")
    from tests.checkpoint.families import save_model
    from tests.checkpoint.judge import TOKENS, imported_logits

    judge = save_model(transformers, case, tmp_path / "hf")
    judge.resize_token_embeddings(21, mean_resizing=True)
    expected, found = judge(TOKENS).logits, imported_logits(tmp_path / "hf", vocabulary=21)
    torch.testing.assert_close(found[..., :13], expected[..., :13], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[..., 13:], expected[..., 13:], rtol=1e-2, atol=1e-2)  # drawn around the mean


def test_a_tokenizer_with_more_ids_than_rows_is_refused_with_the_way(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "hf")
    write_tokenizer_json(folder / "tokenizer.json")
    run, out = CliRunner(), tmp_path / "ours"
    refused = run.invoke(app, ["import", str(folder), "--out", str(out)])
    assert refused.exit_code == 3
    assert "--resize-vocabulary auto" in refused.stderr
    assert not out.exists()
    num_ids = int(re.search(r"([\d,]+) ids", refused.stderr)[1])  # type: ignore[index]
    taken = run.invoke(app, ["import", str(folder), "--out", str(out), "--resize-vocabulary", "auto"])
    assert taken.exit_code == 0, taken.output
    rows = -(-num_ids // 64) * 64
    assert f"{rows} rows for tokens in place of 13; the new ones are the mean of the others" in taken.stdout
    assert load_model(out)[0].model.vocab_size == rows
    shutil.rmtree(out)
    for few in (num_ids - 1, 13):
        with pytest.raises(CheckpointError, match=f"{few} rows wanted, 13 stored, {num_ids} ids"):
            import_folder(folder, out, Wanted(vocabulary=few))


@pytest.mark.parametrize("wanted", [0, 1, 12, 10**12])
def test_no_row_is_cut_and_none_made_beyond_reason(wanted: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="must leave every row that is stored"):
        import_folder(write_folder(tmp_path / "hf"), tmp_path / "ours", Wanted(vocabulary=wanted))


@pytest.mark.parametrize("text", ["x", "-1", "1.5", "1e9", "9" * 30, "", "AUTO", "\u0663"])
def test_what_is_no_number_of_rows(text: str, tmp_path: Path) -> None:
    command = ["import", str(tmp_path), "--out", str(tmp_path / "ours"), f"--resize-vocabulary={text}"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "must be a number of rows or auto" in result.stderr
