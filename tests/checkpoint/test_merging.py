"""What is exported of an adapted model is plain, and computes the same."""

from pathlib import Path

import pytest
import torch

from mtp_lightning.checkpoint.convert.consolidate import consolidate
from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.checkpoint.format.read_shards import ShardReader
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.errors import CheckpointError
from mtp_lightning.model.mtp_model import MtpModel
from mtp_lightning.recipe import Recipe
from tests.checkpoint.runs import save_run
from tests.support.tiny import tiny_model, tiny_recipe, tiny_rows

LORA = {"rank": 3, "alpha": 7.0, "targets": ["q", "v", "gate", "down"], "in_heads": True}


def adapted(**adapt: object) -> Recipe:
    frozen = ["trunk", "heads", "unembedding"]
    return tiny_recipe(model={"num_hidden_layers": 9}, adapt={"lora": LORA, **adapt}, freeze=frozen)


def save(run: Path, recipe: Recipe, *, num_ranks: int = 1) -> None:
    save_run(run, recipe, 1, num_ranks=num_ranks, model=tiny_model(recipe, torch.float32))


def logits_of(model: MtpModel) -> list[torch.Tensor]:
    tokens, documents, _ = tiny_rows(adapted(), 3)
    hiddens = model.hidden_states(tokens, documents)
    return [model.unembedding.logits(offset, hidden) for offset, hidden in hiddens.items()]


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_merged_logits_are_those_of_the_model_with_updates(tmp_path: Path, num_ranks: int) -> None:
    save(tmp_path / "run", adapted(), num_ranks=num_ranks)
    consolidate(tmp_path / "run", tmp_path / "out")
    trained, plain = load_model(tmp_path / "run"), load_model(tmp_path / "out")
    names = {name for name, _ in trained[1].named_parameters()}
    assert {name for name, _ in plain[1].named_parameters()} == {name for name in names if ".lora." not in name}
    assert (plain[0].adapt.lora, plain[0].model) == (None, trained[0].model)
    for own, expected in zip(logits_of(plain[1]), logits_of(trained[1]), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    without = dict(trained[1].named_parameters())["trunk.layers.0.self_attn.q_proj.weight"]
    assert not torch.allclose(dict(plain[1].named_parameters())["trunk.layers.0.self_attn.q_proj.weight"], without)


def test_blocks_that_end_inside_a_row_are_merged_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "run", adapted())
    consolidate(tmp_path / "run", tmp_path / "whole")
    monkeypatch.setattr("mtp_lightning.checkpoint.format.read_shards.BLOCK_BYTES", 4 * 11)
    consolidate(tmp_path / "run", tmp_path / "blocks")
    whole, blocks = (ShardReader(tmp_path / name) for name in ("whole", "blocks"))
    for name in whole.names:
        torch.testing.assert_close(blocks.read(name), whole.read(name), rtol=1e-6, atol=1e-7)


def test_a_folder_of_transformers_is_merged_too(tmp_path: Path) -> None:
    recipe = adapted(layer_mix={"main_head": False})
    save(tmp_path / "run", recipe)
    export_model(tmp_path / "run", tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "back", Wanted(num_offsets=4, init="random"))
    own, expected = (logits_of(load_model(tmp_path / name)[1])[0] for name in ("back", "run"))
    torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_main_head_that_reads_a_mixture_is_not_exported_for_transformers(tmp_path: Path) -> None:
    save(tmp_path / "run", adapted(layer_mix={}))
    with pytest.raises(CheckpointError) as caught:
        export_model(tmp_path / "run", tmp_path / "hf")
    assert "must read the last layer" in caught.value.expected
    consolidate(tmp_path / "run", tmp_path / "out")
    trained, plain = load_model(tmp_path / "run"), load_model(tmp_path / "out")
    for own, expected in zip(logits_of(plain[1]), logits_of(trained[1]), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
