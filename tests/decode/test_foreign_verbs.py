"""`mtp generate`, `bench decode`, `bench tree` and `eval` of a checkpoint whose trunk is of transformers."""

import json

import pytest
import torch
from typer.testing import CliRunner

from mtp_lightning.cli.app import app
from mtp_lightning.data.loading.factory import prepare_data
from mtp_lightning.decode import generate
from tests.checkpoint.runs import save_run
from tests.support.architectures import architecture_recipe
from tests.support.tiny import tiny_model

pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[transformers]'"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run folder, and the model in it: windows of five positions, and two kinds of layers."""
    folder = tmp_path_factory.mktemp("foreign")
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(60):
        (corpus / f"{number}.txt").write_text(f"text {number} " * 12)
    recipe = architecture_recipe(
        "gemma3_text",
        settings={"vocab_size": 257, "bos_token_id": None, "eos_token_id": None},
        heads={"kind": "medusa", "num_offsets": 3},
        data={"corpus": [str(corpus)], "seq_len": 24, "validation_fraction": 0.2},
        run={"dir": str(folder / "run"), "cache": str(folder / "cache")},
    )
    prepare_data(recipe)
    model = tiny_model(recipe, torch.float32).eval()
    save_run(folder / "run", recipe, step=1, model=model)
    return folder / "run", model


def mtp(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done


def test_generate_writes_the_models_text(saved):
    run, model = saved
    tokens = generate(model, [list(b"def f(")], max_new_tokens=24, stop_tokens=[256], decoder="greedy").tokens[0]
    shown = mtp("generate", run, "--prompt", "def f(", "--max-new-tokens", 24, "--compare", "--device", "cpu")
    expected = b"def f(" + bytes(token for token in tokens if token < 256)
    assert shown.stdout == expected.decode(errors="replace") + "\n"
    assert "without drafts: the same text" in shown.stderr


def test_bench_and_evaluations_measure(saved, tmp_path):
    run, _ = saved
    sizes = ["--batches", "2", "--prompt-tokens", "8", "--new-tokens", "9", "--rounds", "1"]
    mtp("bench", "decode", run, *sizes, "--device", "cpu", "--json", tmp_path / "decode.json")
    figures = json.loads((tmp_path / "decode.json").read_text())["figures"]
    assert {figure["decoder"] for figure in figures} == {"greedy", "blockwise", "tree"}
    assert all(figure["same_texts"] == 1 for figure in figures)
    mtp("bench", "tree", run, "--out", tmp_path / "tree.json", "--device", "cpu")
    mtp("eval", "acceptance", run, "--device", "cpu")
    mtp("eval", "marginal", run, "--samples", 1, "--last", 3, "--paths", 4, "--device", "cpu")
    mtp("eval", "lens", run, "--samples", 2, "--device", "cpu")
