"""`mtp import --init fitted`: heads that predict before they are trained, on a model that stays what it was."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.huggingface import fitted_heads
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.errors import CheckpointError, DataError
from tests.checkpoint.foreign import llama_tensors, write_folder
from tests.data.text_tokenizers import SENTENCES, write_tokenizer_json

ROWS = 400


@pytest.fixture
def folder(tmp_path):
    """A small Llama with a tokenizer."""
    tensors = llama_tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = 0.3 * torch.randn(ROWS, tensors[name].shape[1], generator=torch.Generator().manual_seed(3))
    path = write_folder(tmp_path / "hf", tensors, vocab_size=ROWS)
    write_tokenizer_json(path / "tokenizer.json", size=ROWS)
    return path


@pytest.fixture
def text(tmp_path):
    """Two documents."""
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("\n".join(SENTENCES[number::2]))
    return str(tmp_path / "*.txt")


def agreement(model, folder):
    """How often the second token's head, at random text of the kind, says what the main head says one token on."""
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("\n".join(SENTENCES)).ids
    rows = torch.tensor(ids[: 35 * (len(ids) // 35)]).view(-1, 35)
    with torch.no_grad():
        states = model.hidden_states(rows, torch.zeros_like(rows))
        main, second = (model.unembedding.logits(offset, states[offset]) for offset in (1, 2))
    return main, (second[:, :-1].argmax(-1) == main[:, 1:].argmax(-1)).float().mean()


@pytest.mark.parametrize("kind", ["sequential", "recursive", "linear"])
def test_the_main_head_stays_and_the_others_agree_with_it_before_training(kind, folder, text, tmp_path):
    found = {}
    for init, fit_on in (("fitted", (text,)), ("random", ())):
        import_folder(folder, tmp_path / init, Wanted(num_offsets=3, kind=kind, init=init, fit_on=fit_on))
        found[init] = agreement(load_model(tmp_path / init)[1], folder)
    assert torch.equal(found["fitted"][0], found["random"][0])
    assert found["fitted"][1] > 1.5 * found["random"][1]
    told = json.loads((tmp_path / "fitted/import.json").read_text())["parameters"]
    fitted = [name for name, parameter in told.items() if parameter["how"] == "fitted"]
    assert len(fitted) == (1 if kind == "recursive" else 2)
    assert all(name.endswith(".weight" if kind == "linear" else "eh_proj.weight") for name in fitted)


def test_a_fit_is_the_same_each_time_and_depends_on_the_text(folder, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Something else altogether, many times over. " * 200)
    for name, source in (("one", text), ("two", text), ("three", str(other))):
        import_folder(folder, tmp_path / name, Wanted(num_offsets=2, kind="sequential", fit_on=(source,)))
    one, two, three = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three"))
    assert one == two
    assert one != three


def test_without_a_tokenizer_heads_are_copies_and_it_is_said(tmp_path, capsys):
    folder = write_folder(tmp_path / "hf")
    import_folder(folder, tmp_path / "ours", Wanted(num_offsets=2, kind="sequential"))
    assert "The heads are not fitted, for heads can be fitted where text can be read" in capsys.readouterr().out
    told = json.loads((tmp_path / "ours/import.json").read_text())["parameters"]
    assert "fitted" not in {parameter["how"] for parameter in told.values()}
    assert "copy)." in (tmp_path / "ours/recipe.yaml").read_text().splitlines()[0]


def test_what_cannot_be_fitted_is_refused_where_it_was_asked_for(folder, tmp_path, monkeypatch):
    def refused(error=CheckpointError, **wanted):
        with pytest.raises(error) as caught:
            import_folder(folder, tmp_path / "ours", Wanted(num_offsets=2, **wanted))
        assert not (tmp_path / "ours").exists()
        return caught.value

    assert refused(kind="medusa", init="fitted").hint == "Choose --init random"
    assert refused(kind="parallel", init="fitted").hint == "Choose --init copy"
    assert refused(kind="sequential", init="copy", fit_on=("x",)).hint == "Leave --fit-on out"
    assert "nowhere" in refused(DataError, kind="sequential", fit_on=(str(tmp_path / "nowhere"),)).found
    tensors = {name: 0 * value for name, value in load_file(folder / "model.safetensors").items()}
    zeros = write_folder(tmp_path / "zeros", tensors, vocab_size=ROWS)
    shutil.copy(folder / "tokenizer.json", zeros)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(SENTENCES))
    with pytest.raises(CheckpointError, match="not all zero"):
        import_folder(zeros, tmp_path / "ours", Wanted(num_offsets=2, kind="sequential", fit_on=(str(text),)))
    monkeypatch.setattr(fitted_heads, "host_bytes", lambda: 1000)
    assert refused(kind="linear", init="fitted").expected == "a model whose heads are fitted must fit into memory"
    (folder / "tokenizer.json").unlink()
    monkeypatch.undo()
    assert "no tokenizer" in refused(kind="linear", init="fitted").found
