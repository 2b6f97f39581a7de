"""What lies beside a model's weights goes with it byte for byte, and all ids that end a text are known."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from mtp_lightning.checkpoint.convert.add_heads import extend_checkpoint
from mtp_lightning.checkpoint.convert.consolidate import consolidate
from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.checkpoint.format.carried_files import SOURCE_CONFIG, all_end_ids
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.cli.prompts import encode_prompts
from mtp_lightning.data.loading.corpus import recipe_tokenizer
from mtp_lightning.errors import CheckpointError
from mtp_lightning.recipe import Recipe
from tests.checkpoint.foreign import llama_tensors, write_folder
from tests.checkpoint.runs import save_run
from tests.data import tokenizer_folders
from tests.data.text_tokenizers import write_tokenizer_json
from tests.support.tiny import tiny_recipe

SIZE = 512
CONTENTS = {
    "tokenizer_config.json": b'{"eos_token": "<|endoftext|>",\r\n "chat_template": "{{ x }}"}',
    "special_tokens_map.json": b"{ }",
    "added_tokens.json": b'{"<|user|>": 1}\n',
    "vocab.json": b"{}",
    "merges.txt": b"#version: 0.2\n",
    "vocab.txt": b"a\nb",
    "tokenizer.model": b"\x00\xff not looked at",
    "spiece.model": b"\x00",
    "tokenizer.model.v3": b"3",
    "tekken.json": b"[]",
    "qwen.tiktoken": b"AA== 0",
    "chat_template.jinja": "{{ messages }} é\r\n".encode(),
    "chat_template.json": b'{"chat_template": "x"}',
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "generation_config.json": b'{"eos_token_id": [3, 7], "temperature": 0.6}',
}
CONFIG = {"vocab_size": SIZE, "eos_token_id": [0, 2], "bos_token_id": 1, "pad_token_id": 2, "some_field": {"a": [1.5]}}


def write_model(folder, *, with_tokenizer=True):
    """A model of somebody else with all files that may lie beside one, and some that are not carried."""
    outside = {name: torch.randn(SIZE, 16) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    write_folder(folder, llama_tensors() | outside, **CONFIG)
    for name, content in (CONTENTS | {"README.md": b"x", "tokenization_x.py": b"x"}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        if with_tokenizer or name == "generation_config.json":
            (folder / name).write_bytes(content)
    if with_tokenizer:
        write_tokenizer_json(folder / "tokenizer.json")
    return folder


def files_of(folder, names):
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_files_go_through_import_run_merge_extension_and_export(with_tokenizer, tmp_path):
    hf = write_model(tmp_path / "hf", with_tokenizer=with_tokenizer)
    names = [*CONTENTS, "tokenizer.json"]
    expected = files_of(hf, names)
    assert len(expected) == (len(names) if with_tokenizer else 1)
    import_folder(hf, tmp_path / "ours", Wanted(num_offsets=2, kind="recursive", init="copy"))
    recipe = load_model(tmp_path / "ours")[0]
    trained = Recipe.model_validate(recipe.model_dump() | {"adapt": {"lora": {"rank": 2}}})
    save_run(tmp_path / "run", trained, 1)
    consolidate(tmp_path / "run", tmp_path / "merged")
    extend_checkpoint(tmp_path / "merged", tmp_path / "extended", 3)
    save_run(tmp_path / "run2", load_model(tmp_path / "extended")[0], 1)
    for number, source in enumerate(("ours", "run", "merged", "extended", "run2")):
        export_model(tmp_path / source, tmp_path / f"back{number}")
        back = files_of(tmp_path / f"back{number}", names)
        assert back == expected, source
        settings = json.loads((tmp_path / f"back{number}/config.json").read_text())
        assert {name: settings.get(name) for name in CONFIG} == CONFIG
        of_source = load_model(tmp_path / source)[0]
        assert all_end_ids(of_source, 0, tmp_path / source) == [0, 2, 3, 7], source
        assert {"tokenization_x.py", SOURCE_CONFIG} & {
            path.name for path in (tmp_path / f"back{number}").iterdir()
        } == set()


@pytest.mark.parametrize(
    ("tokenizer", "is_framed"),
    [("a begin of sequence, Llama 3", True), ("begin and end of sequence", True), ("byte level, ChatML", False)],
)
def test_texts_and_prompts_get_what_the_tokenizer_puts_around_them(tokenizer, is_framed, tmp_path):
    hf = write_model(tmp_path / "hf", with_tokenizer=False)
    tokenizer_folders.write_folder(hf, tokenizer)
    import_folder(hf, tmp_path / "ours", Wanted(num_offsets=2))
    recipe = load_model(tmp_path / "ours")[0]
    assert recipe.data.add_special_tokens == is_framed
    judge = AutoTokenizer.from_pretrained(hf)
    (prompt,) = encode_prompts(recipe, recipe_tokenizer(recipe), [b"def f(x):"])
    expected = judge("def f(x):")["input_ids"]
    assert prompt.tokens == (expected[:-1] if expected[-1] == judge.eos_token_id else expected)


def test_a_model_trained_here_has_the_end_of_its_tokenizer(tmp_path):
    files = tmp_path / "files"
    files.mkdir()
    end = 0
    for name, carried in (("tokenizer.json", {"chat_template.jinja"}), ("mine.json", set())):
        write_tokenizer_json(files / name)
        (files / "chat_template.jinja").write_bytes(CONTENTS["chat_template.jinja"])
        (files / "generation_config.json").write_bytes(CONTENTS["generation_config.json"])  # of other weights
        recipe = tiny_recipe(model={"vocab_size": SIZE}, data={"tokenizer": str(files / name)})
        save_run(tmp_path / f"run {name}", recipe, 1)
        export_model(tmp_path / f"run {name}", tmp_path / f"back {name}")
        settings = json.loads((tmp_path / f"back {name}/config.json").read_text())
        assert (settings["eos_token_id"], settings["bos_token_id"]) == (end, end)
        written = {path.name for path in (tmp_path / f"back {name}").iterdir()}
        assert written == {"README.md", "config.json", "export.json", "model.safetensors", "tokenizer.json"} | carried
        assert (tmp_path / f"back {name}/tokenizer.json").read_bytes() == (files / name).read_bytes()
        assert all_end_ids(recipe, end) == [end]


def test_a_folder_that_was_moved_has_its_own_tokenizer(tmp_path):
    import_folder(write_model(tmp_path / "hf"), tmp_path / "ours", Wanted(num_offsets=1))
    (tmp_path / "ours").rename(tmp_path / "moved")
    recipe = load_model(tmp_path / "moved")[0]
    assert recipe.data.tokenizer == str(tmp_path / "moved/tokenizer.json")
    assert all_end_ids(recipe, 0, tmp_path / "moved") == [0, 2, 3, 7]
    export_model(tmp_path / "moved", tmp_path / "back")
    assert files_of(tmp_path / "back", CONTENTS) == CONTENTS


def test_a_model_of_bytes_ends_with_its_last_id(tmp_path):
    save_run(tmp_path / "run", tiny_recipe(model={"vocab_size": 257}), 1)
    export_model(tmp_path / "run", tmp_path / "back")
    settings = json.loads((tmp_path / "back/config.json").read_text())
    assert (settings["eos_token_id"], settings["bos_token_id"]) == (256, 256)


def test_another_tokenizer_has_no_use_for_the_files_of_the_first(tmp_path):
    import_folder(write_model(tmp_path / "hf"), tmp_path / "ours", Wanted(num_offsets=1))
    recipe = load_model(tmp_path / "ours")[0]
    other = write_tokenizer_json(tmp_path / "other.json", specials=("<|endoftext|>", "<|x|>", "<|y|>"))
    data = recipe.data.model_copy(update={"tokenizer": str(other)})
    assert all_end_ids(recipe.model_copy(update={"data": data}), 0, tmp_path / "ours") == [0]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"eos_token_id": "x"}', b'{"eos_token_id": [1, null]}'])
def test_generation_settings_that_say_no_ids_are_refused(content, tmp_path):
    hf = write_model(tmp_path / "hf")
    (hf / "generation_config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"(generation_config.json must be|eos_token_id must be)"):
        import_folder(hf, tmp_path / "ours", Wanted(num_offsets=1))
    assert not (tmp_path / "ours").exists()


def test_an_interrupted_import_with_templates_is_done_again(tmp_path):
    partial = tmp_path / "ours.partial"
    (partial / "additional_chat_templates").mkdir(parents=True)
    (partial / "tokenizer.model.v3").write_bytes(b"half")
    import_folder(write_model(tmp_path / "hf"), tmp_path / "ours", Wanted(num_offsets=1))
    assert (tmp_path / "ours/additional_chat_templates/tool_use.jinja").is_file()
