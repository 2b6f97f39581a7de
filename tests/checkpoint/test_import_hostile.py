"""Folders whose files were written to do harm: refused in words, at once, before anything of their sizes is made."""

import contextlib
import json
import os
import tracemalloc

import pytest
import safetensors.torch
import torch

from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.errors import CheckpointError, MtpError
from tests.checkpoint.foreign import llama_tensors, write_folder, write_shards
from tests.checkpoint.meta_model import write_meta

MOST_BYTES = 2**24
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True, scope="module")
def loaded_library(tmp_path_factory):
    """Load transformers before memory is measured, where it is installed: it opens what has no trunk here."""
    folder = write_folder(tmp_path_factory.mktemp("loaded") / "hf")
    with contextlib.suppress(CheckpointError):
        import_folder(folder, folder.parent / "ours", Wanted(family="transformers"))


def refusal(folder, error=CheckpointError, **wanted):
    """Import a folder in vain, without taking much memory.

    A peak above the bound is measured again, as `tracemalloc` counts every thread of the process, and what is imported
    on the way; what an import of a folder takes, it takes each time.
    """
    failure, peak = refused(folder, error, wanted)
    if peak >= MOST_BYTES:
        failure, peak = refused(folder, error, wanted)
    assert peak < MOST_BYTES
    assert not (folder.parent / "ours").exists()
    assert all((failure.expected, failure.found, failure.hint))
    assert len(str(failure)) < 2000
    return failure


def refused(folder, error, wanted):
    """The error, and the most bytes that Python held."""
    tracemalloc.start()
    try:
        with pytest.raises(error) as failure:
            import_folder(folder, folder.parent / "ours", Wanted(**wanted))
        return failure.value, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


NUMBERS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
ALL_NUMBERS = (*NUMBERS, "vocab_size", "head_dim", "num_nextn_predict_layers", "num_mtp_layers")
VALUES = (10**9, 10**30, 10**4000, -1, 1.5, float("nan"), "x", "x" * 10**6, [], [0], {}, True)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:9] if value != 10**4000 else "4001 digits")
@pytest.mark.parametrize("name", ALL_NUMBERS)
def test_numbers_that_are_none_or_that_no_file_holds(name, value, tmp_path):
    error = refusal(write_folder(tmp_path / "hf", **{name: value}))
    assert error.expected.startswith("the settings must")
    assert "config.json" in error.found


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: 1000000 (Input should be less"),
        ({"num_hidden_layers": 10**4}, "10,000 layers beside 30 tensors of 6,288 values together"),
        ({"num_nextn_predict_layers": 1000}, "1,003 layers beside 30 tensors"),
        ({"vocab_size": 10**7}, "10,000,000 tokens in the vocabulary beside"),
        ({"num_attention_heads": 2**20, "head_dim": 2**20}, "1,099,511,627,776 channels of all query heads"),
        ({"num_attention_heads": 10**8, "head_dim": [1]}, "head_dim: a list"),
        ({"num_nextn_predict_layers": "x"}, "num_nextn_predict_layers: 'x' (a whole number up to 1,024 is meant)"),
        ({"eos_token_id": -1}, "eos_token_id: -1 (ids are below 13)"),
        ({"eos_token_id": [0, 13]}, "eos_token_id: 13"),
        ({"eos_token_id": "</s>"}, "eos_token_id: '</s>'"),
        ({"eos_token_id": True}, "eos_token_id: True"),
        ({"rms_norm_eps": [1]}, "rms_norm_eps: a list (a number is meant)"),
        ({"rope_theta": 10**400}, "rope_theta: 1"),
        ({"rope_scaling": ["linear"]}, "rope_scaling: a list"),
        ({"rope_scaling": {"type": ["linear"]}}, "a list"),
        ({"rope_scaling": {"type": "linear", "factor": {}}}, "factor: an object"),
        ({"sliding_window": "wide"}, "sliding_window: 'wide'"),
        ({"layer_types": 7}, "int"),
        ({"layer_types": [{}]}, "an object"),
        ({"model_type": ["llama"]}, "model_type a list"),
        ({"model_type": "other", "architectures": 5}, "model_type 'other'"),
        ({"quantization_config": {"quant_method": [[]]}}, "by the method a list"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: 'yes'"),
        ({"max_position_embeddings": 1}, "seq_len: 1"),
    ],
)
def test_what_is_odd_is_named(settings, found, tmp_path):
    assert found in refusal(write_folder(tmp_path / "hf", **settings)).found


@pytest.mark.parametrize("value", [10**9, -1, 0, "x", [2], 1.5])
@pytest.mark.parametrize("name", ["dim", "n_layers", "n_heads", "n_future_tokens"])
def test_metas_numbers(name, value, tmp_path):
    write_meta(tmp_path / "meta")
    path = tmp_path / "meta/params.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    assert "params.json" in refusal(tmp_path / "meta").found


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b'{"hidden_size": ' * 100_000, "nested too deep"),
        (b'{"hidden_size": ' + b"[" * 900 + b"]" * 900 + b"}", "hidden_size: a list"),
        (b'{"hidden_size": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"model_type": "\xff"}', "bytes that are not UTF-8"),
        (b"[]", "a list in place of an object"),
        (b"null", "null in place of an object"),
        (b"", "no JSON"),
    ],
    ids=["deep list", "deep object", "deep value", "long number", "not UTF-8", "list", "null", "empty"],
)
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_bytes_that_are_no_settings(name, content, found, tmp_path):
    (write_folder(tmp_path / "hf") / name).write_bytes(content)
    if name == INDEX:
        (tmp_path / "hf/model.safetensors").unlink()  # it would be read in place of shards
    error = refusal(tmp_path / "hf")
    assert found in error.found or (name == INDEX and "no weight_map" in error.found)
    assert str(tmp_path / "hf" / name) in error.found


@pytest.mark.parametrize(
    "name",
    [
        *("../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..\\model.safetensors", "", "..", "."),
        *("config.json", "a\0.safetensors", "a\x1b[2J.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors"),
        *(7, None, ["model.safetensors"], {}),
    ],
)
def test_the_index_names_files_of_the_folder_only(name, tmp_path):
    folder = write_shards(tmp_path / "hf", 2)
    (tmp_path / "model.safetensors").write_bytes((folder / "model-00001-of-00002.safetensors").read_bytes())
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (folder / INDEX).write_text(json.dumps(index))
    error = refusal(folder)
    assert error.expected == "weight_map must name files *.safetensors of the folder itself"
    assert error.found.isprintable()


def test_names_that_speak_of_more_files_than_there_can_be(tmp_path):
    folder = write_folder(tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "model-00001-of-99999999999.safetensors")
    assert "1 of 99999999999 files" in refusal(folder).found
    (folder / "model-00001-of-99999999999.safetensors").rename(folder / "model-00001-of-09999.safetensors")
    assert "and 9990 more" in refusal(folder).found


def test_more_offsets_than_a_model_can_have(tmp_path):
    assert "1,000,000,000" in refusal(write_folder(tmp_path / "hf"), num_offsets=10**9).found


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model-x.safetensors", INDEX])
@pytest.mark.timeout(20)
def test_a_fifo_is_not_waited_for(name, tmp_path):
    folder = write_folder(tmp_path / "hf")
    if name != INDEX:  # which may be absent
        (folder / ("config.json" if name == "config.json" else "model.safetensors")).unlink()
    os.mkfifo(folder / name)
    if name == INDEX:
        import_folder(folder, tmp_path / "ours", Wanted())
    else:
        refusal(folder)


def test_a_name_that_no_folder_can_have(tmp_path):
    assert "file name too long" in refusal(tmp_path / ("x" * 300)).found


def test_names_of_tensors_are_shown_and_not_obeyed(tmp_path):
    folder = write_folder(tmp_path / "hf", llama_tensors() | {"\x1b[2Jgone\u202e": torch.ones(1)})
    assert r"1 unexpected: \x1b[2Jgone\u202e" in refusal(folder).found


def test_a_comment_in_the_recipe_stays_one(tmp_path):
    folder = write_folder(tmp_path / "a\nrun: {steps: 7}\nb")
    import_folder(folder, tmp_path / "ours", Wanted())
    lines = (tmp_path / "ours/recipe.yaml").read_text().splitlines()
    assert "run: {steps: 7}" not in lines
    assert r"a\nrun: {steps: 7}\nb" in lines[0]


@pytest.mark.parametrize("name", ["a'); print(1); ('.bin", '$(touch x)".bin'])
def test_a_command_to_paste_holds_no_odd_names(name, tmp_path):
    folder = write_folder(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"")
    error = refusal(folder)
    assert name in error.found
    assert name not in error.hint
    assert "torch.load('FILE'" in error.hint


def test_a_header_that_lies_is_found_by_the_import(tmp_path):
    folder = write_folder(tmp_path / "hf")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + content[8:])
    assert "a header of 4,611,686,018,427,387,904 bytes" in refusal(folder, MtpError).found


def test_one_file_in_place_of_shards_is_read_by_its_link(tmp_path):
    """As in the cache of huggingface_hub: all files of a snapshot are links to blobs elsewhere."""
    folder, blobs = write_shards(tmp_path / "hf", 2), tmp_path / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../blobs/{number}")
    import_folder(folder, tmp_path / "ours", Wanted())
    assert safetensors.torch.load_file(tmp_path / "ours/model.safetensors")
