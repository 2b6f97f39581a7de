"""Folders that cannot be imported: what must hold, what was found, what to do; and nothing is written."""

import json
import re
import sys

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.export.trunk import sources_of
from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.checkpoint.huggingface.canonical_names import Parameter, parameters_of
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.checkpoint.huggingface.modules import DEEPSEEK
from mtp_lightning.cli.app import app
from mtp_lightning.errors import CheckpointError, DataError, RecipeError
from tests.checkpoint.foreign import LAYERS, SETTINGS, llama_tensors, module_tensors, write_folder, write_shards
from tests.checkpoint.meta_model import write_meta
from tests.checkpoint.runs import model_of_step, save_run
from tests.data.text_tokenizers import write_sentencepiece, write_tokenizer_json
from tests.support.tiny import tiny_recipe

QWEN_WINDOW = {"sliding_window": 32, "model_type": "qwen2", "use_sliding_window": True}


def refusal(folder, error=CheckpointError, **wanted):
    """Import a folder in vain."""
    out = folder.parent / "ours"
    with pytest.raises(error) as failure:
        import_folder(folder, out, Wanted(**wanted))
    assert not out.exists()
    assert [*folder.parent.glob("*.partial")] == []
    return failure.value


def test_a_folder_without_settings(tmp_path):
    (tmp_path / "hf").mkdir()
    error = refusal(tmp_path / "hf")
    assert error.expected == "a folder to import must have a config.json (or Meta's params.json)"
    assert error.found == f"neither in {tmp_path / 'hf'}"
    assert "no folder" in refusal(tmp_path / "nowhere").found


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_settings_that_are_none(text, tmp_path):
    (write_folder(tmp_path / "hf") / "config.json").write_text(text, encoding="latin-1")
    assert refusal(tmp_path / "hf").expected == "config.json must be a JSON object"


@pytest.fixture
def without_transformers(monkeypatch):
    """As where that library is not installed."""
    monkeypatch.setitem(sys.modules, "transformers", None)


@pytest.mark.usefixtures("without_transformers")
def test_an_architecture_without_a_trunk_here_needs_transformers(tmp_path):
    folder = write_folder(tmp_path / "hf", model_type="deepseek_v3", architectures=["DeepseekV3ForCausalLM"])
    error = refusal(folder)
    assert "transformers" in error.expected
    assert "must be installed" in error.expected
    assert "pip install" in error.hint


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size"])
def test_a_setting_that_is_missing(name, tmp_path):
    assert refusal(write_folder(tmp_path / "hf", **{name: None})).expected == f"config.json must say {name}"


@pytest.mark.parametrize(
    ("settings", "expected", "found"),
    [
        ({"hidden_act": "relu"}, "hidden_act must be 'silu'", "'relu'"),
        ({"sliding_window": 32, "model_type": "mistral"}, "attend to all positions", "sliding_window of 32 for 64"),
        ({**QWEN_WINDOW, "max_window_layers": 1}, "all positions", "window of 32"),
        ({**QWEN_WINDOW, "layer_types": ["sliding_attention"] * 3}, "all positions", "window of 32"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "type full_attention", "linear_attention"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "scaled by linear, dynamic or llama3", "yarn"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "dynamic or llama3", "for each type of layer"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "possible ones", "no low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0", "0.5"),
        ({"quantization_config": {"quant_method": "fp8"}}, "plain fp32, bf16 or fp16", "by the method fp8"),
        ({"num_attention_heads": "four"}, "possible ones", "num_attention_heads: 'four'"),
        ({"hidden_size": 0}, "possible ones", "hidden_size: 0"),
    ],
)
@pytest.mark.usefixtures("without_transformers")
def test_settings_that_the_model_here_cannot_have(settings, expected, found, tmp_path):
    error = refusal(write_folder(tmp_path / "hf", **settings))
    assert expected in error.expected
    assert found in error.found
    assert str(tmp_path / "hf/config.json") in error.found


def test_a_window_that_is_unused_does_no_harm(tmp_path):
    write_folder(tmp_path / "hf", model_type="mistral", sliding_window=64)
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted())


def test_a_shape_that_is_not_the_settings_is_named_by_tensor(tmp_path):
    error = refusal(write_folder(tmp_path / "hf", intermediate_size=32))
    assert error.expected == "tensors must have the shapes that config.json says"
    assert "model.layers.0.mlp.gate_proj.weight [24, 16] instead of [32, 16]" in error.found
    assert "and 1 more" in error.found


def test_a_padded_vocabulary_is_the_one_of_the_tensors(tmp_path):
    assert (
        "model.embed_tokens.weight [13, 16] instead of [11, 16]"
        in refusal(write_folder(tmp_path / "hf", vocab_size=11)).found
    )


def test_fp8_weights(tmp_path):
    tensors = llama_tensors()
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    error = refusal(write_folder(tmp_path / "hf", tensors))
    assert "model.layers.1.mlp.up_proj.weight of float8_e4m3fn" in error.found


@pytest.mark.parametrize("has_index", [True, False])
def test_a_missing_shard_is_named(has_index, tmp_path):
    folder = write_shards(tmp_path / "hf", 3, has_index=has_index)
    import_folder(folder, tmp_path / "whole", Wanted())
    (folder / "model-00002-of-00003.safetensors").unlink()
    error = refusal(folder)
    assert error.expected == "every shard of the weights must be there"
    assert "no model-00002-of-00003.safetensors" in error.found
    assert ("with 10 tensors" in error.found) == has_index


def test_a_damaged_shard_is_named(tmp_path):
    path = write_folder(tmp_path / "hf") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert str(path) in refusal(tmp_path / "hf").found


def test_a_tensor_in_two_files(tmp_path):
    folder = write_shards(tmp_path / "hf", 2)
    path = folder / "model-00002-of-00002.safetensors"
    both = safetensors.torch.load_file(path) | {"model.embed_tokens.weight": torch.ones(13, 16)}
    safetensors.torch.save_file(both, path)
    assert "model.embed_tokens.weight in both model-00001-of-00002" in refusal(folder).found


@pytest.mark.parametrize("names", [["pytorch_model.bin"], ["consolidated.00.pth"], ["a-1.bin", "a-2.bin"]])
def test_a_pickle_is_refused_with_the_way_to_convert_it(names, tmp_path):
    folder = write_folder(tmp_path / "hf")
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for place, name in enumerate(names):
        part = dict(list(tensors.items())[place :: len(names)])
        torch.save(part, folder / name)
    error = refusal(folder)
    assert "a pickle can run any program when it is opened" in error.expected
    assert all(name in error.found for name in names)
    code = re.search(r'python -c "(.*)"', error.hint)[1]
    convert(code, folder, names, is_last="other 1 files" not in error.hint)
    import_folder(folder, tmp_path / "ours", Wanted())


def convert(code, folder, names, *, is_last):
    """Follow the hint, in the folder, for every file."""
    assert is_last == (len(names) == 1)
    for number, name in enumerate(names, start=1):
        mine = code.replace(names[0], name).replace("model-00001", f"model-{number:05d}")
        mine = mine.replace(f"'{name}'", f"'{folder / name}'").replace(", 'model", f", '{folder}/model")
        exec(mine, {})


def test_no_weights_at_all(tmp_path):
    (write_folder(tmp_path / "hf") / "model.safetensors").unlink()
    assert refusal(tmp_path / "hf").found == f"none in {tmp_path / 'hf'}"


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.v_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_missing_tensor_is_an_error_unless_named(name, tmp_path):
    tensors = llama_tensors()
    del tensors[name]
    folder = write_folder(tmp_path / "hf", tensors)
    error = refusal(folder)
    assert f"1 missing: {name}; in " in error.found
    assert "--allow PATTERN" in error.hint
    import_folder(folder, tmp_path / "ours", Wanted(allow=(name,)))
    report = json.loads((tmp_path / "ours/import.json").read_text())
    assert report["missing"] == [name]
    assert sum(one["how"] == "fresh" for one in report["parameters"].values()) == 1


def test_an_unexpected_tensor_is_an_error_unless_named(tmp_path, capsys):
    extra = {"model.layers.0.self_attn.q_proj.lora_A": torch.ones(2)}
    buffers = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.0.attention.masked_bias")
    extra |= {name: torch.ones(2, dtype=torch.uint8) for name in buffers}
    folder = write_folder(tmp_path / "hf", llama_tensors() | extra)
    assert "1 unexpected: model.layers.0.self_attn.q_proj.lora_A; in " in refusal(folder).found
    import_folder(folder, tmp_path / "ours", Wanted(allow=("*.lora_*",)))
    assert "  unexpected   1 allowed: model.layers.0.self_attn.q_proj.lora_A\n" in capsys.readouterr().out


def test_nothing_is_allowed_in_vain(tmp_path):
    error = refusal(write_folder(tmp_path / "hf"), allow=("lm_head.*",))
    assert "none like 'lm_head.*' (missing: none; unexpected: none)" in error.found


def test_a_tied_matrix_may_be_stored_twice_if_it_is_the_same(tmp_path, capsys):
    tensors = llama_tensors()
    folder = write_folder(tmp_path / "hf", tensors, tie_word_embeddings=True)
    import_folder(folder, tmp_path / "both", Wanted())
    assert (
        "lm_head.weight is stored and differs from model.embed_tokens.weight: both are kept" in capsys.readouterr().out
    )
    assert not load_model(tmp_path / "both")[0].model.tie_word_embeddings
    write_folder(
        folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, tie_word_embeddings=True
    )
    import_folder(folder, tmp_path / "ours", Wanted())
    assert load_model(tmp_path / "ours")[0].model.tie_word_embeddings


def test_modules_of_the_folder_are_not_left_out_in_silence(tmp_path):
    folder = write_folder(tmp_path / "hf", llama_tensors() | module_tensors("deepseek"))
    error = refusal(folder, init="random")
    assert "13 unexpected: " in error.found
    assert "brings heads of its own (DeepSeek)" in error.hint
    assert "13 unexpected: " in refusal(folder, num_offsets=1).found
    assert "13 missing: model.layers.4.enorm.weight" in refusal(folder, num_offsets=3).found
    import_folder(folder, tmp_path / "ours", Wanted(num_offsets=2, init="copy", allow=(f"model.layers.{LAYERS}.*",)))


def test_modules_that_settings_declare_must_be_there(tmp_path):
    error = refusal(write_folder(tmp_path / "hf", num_nextn_predict_layers=1))
    assert "13 missing: model.layers.3.enorm.weight" in error.found


def test_a_module_with_another_embedding_is_refused(tmp_path):
    own = {f"model.layers.{LAYERS}.embed_tokens.weight": torch.ones(13, 16)}
    error = refusal(write_folder(tmp_path / "hf", llama_tensors() | module_tensors("deepseek") | own))
    assert f"1 unexpected: model.layers.{LAYERS}.embed_tokens.weight" in error.found


def test_heads_that_cannot_be(tmp_path):
    folder = write_folder(tmp_path / "hf")
    assert "neither modules nor extra heads" in refusal(folder, init="native").found
    assert "--kind medusa" in refusal(folder, init="copy", kind="medusa").found
    modules = write_folder(tmp_path / "with", llama_tensors() | module_tensors("mimo"))
    assert "the kind of the folder's heads, sequential" in refusal(modules, kind="parallel", init="native").expected
    tensors = {name: value for name, value in llama_tensors().items() if not re.search(r"layers\.[12]", name)}
    error = refusal(write_folder(tmp_path / "one", tensors, num_hidden_layers=1), RecipeError)
    assert "model.num_hidden_layers" in error.found


def test_metas_layout_must_be_whole(tmp_path):
    tensors = write_meta(tmp_path / "meta")
    del tensors["extra_heads.1.attention.wk.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "meta/consolidated.safetensors")
    assert "1 missing: extra_heads.1.attention.wk.weight" in refusal(tmp_path / "meta").found
    del tensors["tok_embeddings.weight"]
    safetensors.torch.save_file(tensors, tmp_path / "meta/consolidated.safetensors")
    assert "must have tok_embeddings.weight" in refusal(tmp_path / "meta").expected
    (tmp_path / "meta/params.json").write_text(json.dumps({"dim": 16}))
    assert "params.json must say n_heads" in refusal(tmp_path / "meta").expected


@pytest.mark.parametrize(
    ("write", "name"), [(write_tokenizer_json, "tokenizer.json"), (write_sentencepiece, "tokenizer.model")]
)
def test_the_tokenizer_is_carried_along(write, name, tmp_path):
    tensors = llama_tensors() | {n: torch.randn(512, 16) for n in ("model.embed_tokens.weight", "lm_head.weight")}
    folder = write_folder(tmp_path / "hf", tensors, vocab_size=512, eos_token_id=[2, 3])
    write(folder / name)
    (folder / "tokenizer_config.json").write_text('{"bos_token": "x"}')
    import_folder(folder, tmp_path / "ours", Wanted())
    recipe = load_model(tmp_path / "ours")[0]
    assert recipe.data.tokenizer == str(tmp_path / "ours" / name)
    assert recipe.data.end_of_document == 2
    export_model(tmp_path / "ours", tmp_path / "back")
    for place in ("ours", "back"):
        assert (tmp_path / place / name).read_bytes() == (folder / name).read_bytes()
        assert (tmp_path / place / "tokenizer_config.json").read_text() == '{"bos_token": "x"}'
    assert json.loads((tmp_path / "back/config.json").read_text())["eos_token_id"] == [2, 3]
    import_folder(folder, tmp_path / "other", Wanted(end_of_document=5))
    assert load_model(tmp_path / "other")[0].data.end_of_document == 5
    export_model(tmp_path / "other", tmp_path / "other_back")
    assert json.loads((tmp_path / "other_back/config.json").read_text())["eos_token_id"] == [2, 3, 5]


def test_a_tokenizer_larger_than_the_embedding(tmp_path):
    write_tokenizer_json(write_folder(tmp_path / "hf") / "tokenizer.json")
    error = refusal(tmp_path / "hf")
    assert error.expected == "the embedding must have a row for every id of the tokenizer"
    assert re.search(r"\d+ ids in .*tokenizer.json and 13 rows", error.found)


def test_a_tokenizer_whose_end_is_in_doubt(tmp_path):
    write_tokenizer_json(write_folder(tmp_path / "hf", eos_token_id=None) / "tokenizer.json", specials=("<x>",))
    assert "must end a document" in refusal(tmp_path / "hf", DataError).expected


def test_our_own_folders_and_occupied_ones(tmp_path):
    write_folder(tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "mine", Wanted())
    assert f"init.path={tmp_path / 'mine'}" in refusal(tmp_path / "mine").hint
    with pytest.raises(CheckpointError, match="must be new or empty; found a folder with"):
        import_folder(tmp_path / "hf", tmp_path / "mine", Wanted())


def test_an_interrupted_import_is_done_again(tmp_path):
    write_folder(tmp_path / "hf")
    (tmp_path / "ours.partial").mkdir()
    for name in ("model.safetensors", "import.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "ours.partial" / name).write_bytes(b"half")
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted())
    assert not (tmp_path / "ours.partial").exists()


def test_what_no_family_can_say_is_not_exported(tmp_path):
    save_run(tmp_path / "run", tiny_recipe(model={"parallel_residual": True}), 1)
    with pytest.raises(CheckpointError) as failure:
        export_model(tmp_path / "run", tmp_path / "out")
    assert failure.value.found == "parallel_residual = True, which llama cannot have"
    save_run(tmp_path / "other", tiny_recipe(model={"family": "qwen3"}), 1)
    with pytest.raises(CheckpointError, match="qk_norm = False, which qwen3 cannot have"):
        export_model(tmp_path / "other", tmp_path / "out")


def test_the_verbs(tmp_path):
    write_folder(tmp_path / "hf", llama_tensors() | module_tensors("mimo"))
    run = CliRunner()
    wanted = ["--offsets", "3", "--kind", "chained", "--init", "copy", "--allow", "model.mtp_*"]
    result = run.invoke(app, ["import", str(tmp_path / "hf"), "--out", str(tmp_path / "ours"), *wanted])
    assert result.exit_code == 0, result.output
    assert f"Train it: mtp train {tmp_path / 'ours/recipe.yaml'}\n" in result.stdout
    heads = load_model(tmp_path / "ours")[0].heads
    assert (heads.kind, heads.num_offsets) == ("chained", 3)
    result = run.invoke(app, ["export", str(tmp_path / "ours"), "--out", str(tmp_path / "back"), "--format", "trunk"])
    assert result.exit_code == 0, result.output
    assert "Left out, because the format has no place for it: offset 2 (9 tensors), offset 3 (" in result.stdout
    found = safetensors.torch.load_file(tmp_path / "back/model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in llama_tensors().items())
    result = run.invoke(app, ["import", str(tmp_path), "--out", str(tmp_path / "no")])
    assert result.exit_code == 3
    assert "must have a config.json" in result.stderr


def test_a_trained_model_is_exported_with_its_own_settings(tmp_path):
    """The base model of a natively trained one: trunk and main head, however many layers the other heads took."""
    recipe = tiny_recipe(heads={"kind": "chained", "order": "anticausal"})
    save_run(tmp_path / "run", recipe, 1)
    export_model(tmp_path / "run", tmp_path / "back")
    import_folder(tmp_path / "back", tmp_path / "plain", Wanted())
    tokens = torch.randint(13, (2, 13))
    ours, plain = model_of_step(recipe, 1), load_model(tmp_path / "plain")[1]
    expected = ours.unembedding.logits(1, ours.hidden_states(tokens, torch.zeros_like(tokens))[1])
    rows = tokens[:, :10]
    found = plain.unembedding.logits(1, plain.hidden_states(rows, torch.zeros_like(rows))[1])
    assert torch.equal(found, expected)
    assert SETTINGS["model_type"] == json.loads((tmp_path / "back/config.json").read_text())["model_type"]


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("trunk.layers.0.mlp.up_proj.update", Parameter("layers.0.mlp.up_proj.update", (2, 2), "trunk")),
        ("layer_mix.1.weight", Parameter(None, (2,), "layer_mix")),
    ],
)
def test_nothing_that_the_next_token_depends_on_is_left_out(name, parameter):
    recipe = tiny_recipe()
    parameters = parameters_of(recipe)
    assert len(sources_of(recipe, parameters, "llama", None)) < len(parameters)
    with pytest.raises(CheckpointError, match=f"none for {name}"):
        sources_of(recipe, parameters | {name: parameter}, "llama", None)


def test_nothing_of_a_module_is_left_out():
    recipe = tiny_recipe(heads={"kind": "sequential"})
    parameters = parameters_of(recipe)
    assert len(sources_of(recipe, parameters, "llama", DEEPSEEK)) == len(parameters)
    name, unknown = "heads.blocks.0.update", Parameter("modules.0.layers.0.mlp.up_proj.update", (2, 2), "offset 2")
    with pytest.raises(CheckpointError, match=f"none for {name}"):
        sources_of(recipe, parameters | {name: unknown}, "llama", DEEPSEEK)


@pytest.mark.parametrize("name", ["vocab.json", "vocab.txt", "tiktoken.model"])
def test_a_tokenizer_of_other_files_is_named_with_the_command_that_converts_it(name, tmp_path, capsys):
    write_folder(tmp_path / "hf", llama_tensors())
    (tmp_path / "hf" / name).write_text("{}")
    import_folder(tmp_path / "hf", tmp_path / "out", Wanted())
    said = " ".join(capsys.readouterr().out.split())
    assert f"has {name}, and no tokenizer.json. Write a tokenizer.json once, with transformers: python -c" in said
