"""Exported folders have every tensor that SGLang's loaders ask for, in its shape, and none that they would skip."""

import json

import pytest
import safetensors.torch

from mtp_lightning.checkpoint.export.formats import FORMATS
from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.recipe.draft_vocabulary import packed_ids
from tests.checkpoint import sglang_tables
from tests.checkpoint.runs import save_run
from tests.support.tiny import HEAD_KINDS, tiny_model, tiny_recipe

QWEN2, QWEN3 = {"family": "qwen2", "qkv_bias": True}, {"family": "qwen3", "qk_norm": True, "head_dim": 6}
TIED = {"tie_word_embeddings": True}
FEWER = {"draft_vocabulary": 3, "draft_token_ids": packed_ids([0, 4, 9])}
TWO = {"num_offsets": 2}
SERVED = {
    "eagle of parallel heads": ("eagle", HEAD_KINDS["parallel"] | TWO, {}),
    "eagle of two layers": ("eagle", HEAD_KINDS["parallel_two_layers"] | TWO, TIED),
    "eagle with a matrix": ("eagle", HEAD_KINDS["parallel_replicated"] | TWO, {}),
    "eagle of fewer ids": ("eagle", HEAD_KINDS["parallel"] | TWO | FEWER, {}),
    "eagle without a layer": ("eagle", HEAD_KINDS["anticausal"] | TWO, QWEN3),
    "mimo": ("mimo", HEAD_KINDS["sequential_pre_norm"] | TWO, {}),
    "mimo, tied": ("mimo", HEAD_KINDS["sequential_pre_norm"] | TWO, QWEN2 | TIED),
    "qwen3_5": ("qwen3_5", HEAD_KINDS["sequential"] | TWO, QWEN3),
    "qwen3_5, folded": ("qwen3_5", HEAD_KINDS["sequential_pre_norm"] | TWO, QWEN3),
}
TABLES = {"eagle": sglang_tables.eagle3, "mimo": sglang_tables.mimo, "qwen3_5": sglang_tables.qwen3_5}


@pytest.mark.parametrize("name", SERVED)
def test_a_folder_is_what_the_loader_asks_for(name, tmp_path):
    form, heads, model = SERVED[name]
    recipe = tiny_recipe(heads=heads, model=model)
    assert drafts_in_sglang(form, recipe)
    save_run(tmp_path / "run", recipe, 1, model=tiny_model(recipe))
    export_model(tmp_path / "run", tmp_path / "out", form)
    folder = tmp_path / "out/drafter" if form == "eagle" else tmp_path / "out"
    told = json.loads((folder / "config.json").read_text())
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert {one: tuple(value.shape) for one, value in stored.items()} == TABLES[form](told)


@pytest.mark.parametrize(
    ("heads", "model"),
    [(HEAD_KINDS["linear"], {}), (HEAD_KINDS["causal"], {}), (HEAD_KINDS["parallel"], QWEN2)],
    ids=["its fc is passed over", "no state of the last layer", "biases are skipped"],
)
def test_drafters_that_it_would_run_otherwise_are_not_offered_to_it(heads, model, tmp_path, capsys):
    recipe = tiny_recipe(heads=heads, model=model)
    assert not drafts_in_sglang("eagle", recipe)
    save_run(tmp_path / "run", recipe, 1, model=tiny_model(recipe))
    export_model(tmp_path / "run", tmp_path / "out", "eagle")
    said = capsys.readouterr().out
    assert "vllm serve" in said
    assert "sglang" not in said
    assert "sglang" not in (tmp_path / "out/README.md").read_text()


def drafts_in_sglang(form, recipe):
    (row,) = [one for one in FORMATS[form].engines if one.name == "SGLang"]
    return row.drafts(recipe)
