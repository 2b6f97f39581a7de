"""`mtp bench data`, from text to table and JSON."""

import json

import pytest

from mtp_lightning.bench.data_loading import bench_data
from tests.data.text_tokenizers import write_tokenizer_json


def test_table_and_json(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    tokenizer = write_tokenizer_json(tmp_path / "tokenizer.json")
    figures = bench_data(text_mb=1, tokenizer=str(tokenizer), repeats=1, json_path=tmp_path / "data.json")
    shown = capsys.readouterr().out
    assert "np.memmap" in shown
    assert json.loads((tmp_path / "data.json").read_text()) == figures
    assert all(figure > 0 for figure in figures.values())
    assert figures["row_tokens_to_memmap"] == pytest.approx(
        figures["row_tokens_mtokens_per_s"] / figures["memmap_mtokens_per_s"]
    )
