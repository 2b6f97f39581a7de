"""The card of an exported folder, read by Hugging Face's own reader of cards; it says what was measured and no more."""

import json
from pathlib import Path
from typing import Any

import pytest

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.checkpoint.format.carried_files import license_of
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from tests.checkpoint.foreign import llama_tensors, module_tensors, write_folder
from tests.checkpoint.runs import save_run
from tests.support.tiny import tiny_recipe

hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
SUMMARY: dict[str, Any] = {
    "validation": {"step": 40, "mean_acceptance_length": 1.75, "acceptance_rate": {"2": 0.5, "3": 0.25}},
    "validation_by_source": {"shards/code": {"mean_acceptance_length": 2.5, "acceptance_rate": {"2": 0.9, "3": 0.6}}},
}
FIGURE = {"decoder": "chain", "batch": 1, "draft_length": 3, "is_ceiling": False, "speedup": 1.4321}
BENCH = {"benchmark": "decode", "machine": {"name": "a CPU"}, "figures": [FIGURE, {**FIGURE, "decoder": "greedy"}]}


def card_of(run: Path, out: Path, name: str = "trunk") -> Any:
    export_model(run, out, name)
    return hub.ModelCard((out / "README.md").read_text())


def test_it_says_what_the_run_has_measured(tmp_path: Path) -> None:
    recipe = tiny_recipe(heads={"num_offsets": 3})
    save_run(tmp_path / "run", recipe, 7)
    (tmp_path / "run/summary.json").write_text(json.dumps(SUMMARY))
    (tmp_path / "run/decode.json").write_text(json.dumps(BENCH))
    card = card_of(tmp_path / "run", tmp_path / "out")
    assert (card.data.library_name, card.data.license, card.data.base_model) == ("transformers", None, None)
    assert {"multi-token-prediction", "trunk"} <= {*card.data.tags}
    lines = card.content.splitlines()
    assert "| all | 1.75 | 50.0% | 25.0% |" in lines
    assert "| code | 2.50 | 90.0% | 60.0% |" in lines
    assert "| chain | 1 | 3 | a CPU | 1.43 |" in lines
    assert "greedily, step 40" in card.content
    assert not [line for line in lines if line.startswith("| greedy")]
    assert "| licence of the base model | not stated |" in lines
    assert "18 of their tensors are left out" in card.content
    assert "    vllm serve ." in lines


@pytest.mark.parametrize("broken", [{}, {"validation": None}, {"validation": {}, "validation_by_source": [3]}, []])
def test_what_was_not_measured_is_not_told(broken: object, tmp_path: Path) -> None:
    save_run(tmp_path / "run", tiny_recipe(name="| a <b>\x1b[2J"), 7)
    (tmp_path / "run/summary.json").write_text(json.dumps(broken))
    for number, odd in enumerate(({"benchmark": "decode", "figures": 3}, {"benchmark": "decode"}, BENCH["figures"])):
        (tmp_path / f"run/{number}.json").write_text(json.dumps(odd))
    card = card_of(tmp_path / "run", tmp_path / "out")
    assert "Measured speed" not in card.content
    assert "%" not in card.content.partition("How to serve")[0]
    assert "\x1b" not in card.content
    assert "| <b>" not in card.content


LICENSES = {
    "---\nlicense: apache-2.0\ntags: [a]\n---\n# x": "apache-2.0",
    "---\r\nlicense: 'llama3.1'\r\n---\r\n": "llama3.1",
    "# license\nlicense: mit\n": None,
    "---\ntags: [a]\n---\nlicense: mit\n": None,
    "---\nlicense: [mit]\n---\n": None,
    "---\nlicense: mit\x1b[2J\n---\n": None,
}


@pytest.mark.parametrize(("text", "expected"), LICENSES.items())
def test_licences_of_cards(text: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    assert license_of(tmp_path) == expected


def test_the_base_model_and_its_licence_come_along(tmp_path: Path) -> None:
    """Through import, run and export, though the folder that was imported has gone."""
    folder = tmp_path / "models--Some-Org--Base-1B/snapshots/abc"
    write_folder(folder, llama_tensors() | module_tensors("deepseek"), num_nextn_predict_layers=1)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    import_folder(folder, tmp_path / "ours", Wanted())
    (folder / "README.md").unlink()
    recipe, model = load_model(tmp_path / "ours")
    save_run(tmp_path / "run", recipe, 2, model=model)
    for source, out in (("run", "a"), ("ours", "b")):
        card = card_of(tmp_path / source, tmp_path / out, "hf_mtp")
        assert (card.data.license, card.data.base_model) == ("apache-2.0", "Some-Org/Base-1B")
        assert "| licence of the base model | apache-2.0 |" in card.content
        assert "all are here" in card.content
    assert license_of(tmp_path / "a") == "apache-2.0"


def test_a_folder_without_a_tokenizer_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(tmp_path / "bytes", tiny_recipe(), 1)
    save_run(tmp_path / "gone", tiny_recipe(data={"tokenizer": str(tmp_path / "gone.json")}), 1)
    for name, why in (("bytes", "the model reads bytes"), ("gone", f"{tmp_path}/gone.json is not there")):
        export_model(tmp_path / name, tmp_path / f"{name}-out")
        assert f"No tokenizer in the folder: {why}" in capsys.readouterr().out
