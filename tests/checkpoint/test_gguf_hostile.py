"""Files of llama.cpp that cannot be imported: what must hold, what was found, what to do; and nothing is written."""

import os
import random
import struct
import sys
import tracemalloc

import numpy as np
import pytest
from typer.testing import CliRunner

from mtp_lightning.checkpoint.huggingface.gguf_model import open_gguf
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.cli.app import app
from mtp_lightning.errors import CheckpointError, DataError, RecipeError

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[judge]'"
)
gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'mtp_lightning[gguf]'")
from tests.checkpoint.gguf_models import model_of, save_gguf  # noqa: E402

MOST_BYTES = 2**24
SMALL_TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*"abcdefghijk", "ab", "<end>"],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.token_type": [1] * 12 + [3],
    "tokenizer.ggml.eos_token_id": 12,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Bytes of a file that can be imported."""
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    save_gguf(model_of(transformers, "llama"), "llama", path, "Q8_0", keys=SMALL_TOKENIZER)
    return path.read_bytes()


def refusal(path, **wanted):
    """Import a file in vain."""
    tracemalloc.start()
    with pytest.raises(CheckpointError) as failure:
        import_folder(path, path.parent / "ours", Wanted(num_offsets=1, **wanted))
    assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    tracemalloc.stop()
    assert not (path.parent / "ours").exists()
    error = failure.value
    assert error.expected
    assert error.found
    assert error.hint
    return error


def written(path, content):
    path.write_bytes(content)
    return path


def test_it_can_be_imported(whole, tmp_path):
    import_folder(written(tmp_path / "a.gguf", whole), tmp_path / "ours", Wanted(num_offsets=1))


def test_truncated_anywhere(whole, tmp_path):
    (tmp_path / "made").mkdir()
    for length in (*range(40), *range(40, len(whole) - 32, len(whole) // 150)):
        with pytest.raises(CheckpointError) as failure:
            open_gguf(written(tmp_path / "a.gguf", whole[:length]), tmp_path / "made")
        assert "as llama.cpp writes it" in failure.value.expected
        assert failure.value.hint == "Download the file again, whole"


def _flipped(whole, tmp_path, seeds, most):
    (tmp_path / "made").mkdir()
    num_refused = 0
    tracemalloc.start()
    for seed in seeds:
        chance = random.Random(seed)
        content = bytearray(whole)
        for _ in range(chance.choice((1, 1, 3))):
            content[chance.randrange(most)] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        try:
            open_gguf(written(tmp_path / "a.gguf", content), tmp_path / "made")
        except CheckpointError:
            num_refused += 1
    assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    tracemalloc.stop()
    assert 0.2 * len(seeds) < num_refused


def test_flipped_bytes(whole, tmp_path):
    _flipped(whole, tmp_path, range(100), 2600)


@pytest.mark.slow
def test_many_flipped_bytes(whole, tmp_path):
    _flipped(whole, tmp_path, range(1000, 2000), 3000)


def test_flipped_bytes_of_whole_imports(whole, tmp_path):
    for seed in range(25):
        content = bytearray(whole)
        content[random.Random(seed).randrange(2600)] ^= 1 << seed % 8
        try:
            import_folder(written(tmp_path / "a.gguf", content), tmp_path / f"ours{seed}", Wanted(num_offsets=1))
        except (CheckpointError, DataError, RecipeError):
            assert not (tmp_path / f"ours{seed}").exists()


@pytest.mark.parametrize(
    ("begin", "found"),
    [
        (b"", "begins with"),
        (b"Once upon a time there was a text", "begins with"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS"),
        (b"PK\x03\x04", "ZIP"),
        (b"<!DOCTYPE html>", "HTML"),
        (b"tjgg\x01\x00\x00\x00", "before GGUF"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "keys"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "text of"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IQ", 8, 2**62), "text of"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**60), "texts under"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 4, 2**62), "more bytes than"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<IIQ", 9, 9, 2), "unknown type 9"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k" + struct.pack("<I", 77), "unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"\xff" + struct.pack("<I", 4), ""),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<I", 2**31), "axes"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0), "shape"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1) + b"t" + struct.pack("<IQQIQ", 2, 0, 4, 0, 0), "shape"),
    ],
)
def test_headers_that_lie(begin, found, tmp_path):
    assert found in refusal(written(tmp_path / "a.gguf", begin)).found


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        *(
            ({name: None}, f"must say llama.{name}")
            for name in (
                *("block_count", "context_length", "embedding_length", "feed_forward_length"),
                *("attention.head_count", "attention.layer_norm_rms_epsilon"),
            )
        ),
        ({"expert_count": 8}, "without experts"),
        ({"general.type": "adapter"}, "must hold a model"),
        ({"general.type": "mmproj"}, "must hold a model"),
        ({"general.type": "imatrix"}, "must hold a model"),
        ({"general.architecture": "clip"}, "must hold a model"),
        ({"general.architecture": "gemma9"}, "must be one of llama"),
        ({"general.alignment": 24}, "as llama.cpp writes it"),
        ({"attention.sliding_window": 8}, "attend to all positions"),
        ({"attention.causal": False}, "decoder"),
        ({"final_logit_softcapping": 30.0}, "plain one"),
        ({"rope.scaling.type": "yarn"}, ""),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": float("nan")}, "number"),
        ({"rope.freq_base": float("nan")}, "number"),
        ({"rope.freq_base": "much"}, "number"),
        ({"attention.head_count": 0}, ""),
        ({"attention.head_count": 3}, ""),
        ({"attention.head_count": "four"}, ""),
        ({"attention.head_count_kv": [2, 4]}, "same shape"),
        ({"attention.head_count_kv": 3}, ""),
        ({"attention.value_length": 4}, "one size"),
        ({"attention.key_length": 2**31, "attention.value_length": 2**31, "rope.dimension_count": 2**31}, ""),
        ({"block_count": 3}, ""),
        ({"block_count": 0}, "possible"),
        ({"block_count": 2**31}, ""),
        ({"embedding_length": 2**31}, ""),
        ({"feed_forward_length": 2**31}, ""),
        ({"vocab_size": 2**31}, ""),
        ({"split.count": 3}, "every file"),
        ({"tokenizer.ggml.model": "wpm"}, "gpt2 or llama"),
        ({"tokenizer.ggml.pre": "unheard-of"}, "pre-tokenizer"),
        ({"tokenizer.ggml.tokens": ["a"] * 14}, "at most one for each"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokens must be a list"),
        ({"tokenizer.ggml.eos_token_id": 13}, "possible"),
        ({"tokenizer.ggml.merges": ["a b", "xyz"]}, "pairs of tokens"),
        ({"tokenizer.ggml.merges": ["a Q"]}, "tokens that the file has"),
        ({"tokenizer.ggml.token_type": [1]}, "a number for each"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": None}, "scores"),
    ],
)
def test_settings_that_are_not_possible(keys, expected, tmp_path):
    model = model_of(transformers, "llama")
    path = tmp_path / ("a-00001-of-00003.gguf" if "split.count" in keys else "a.gguf")
    save_gguf(model, "llama", path, keys=SMALL_TOKENIZER | keys)
    assert expected in refusal(path).expected


def test_a_model_with_fewer_layers_than_ours_can_have(tmp_path):
    save_gguf(model_of(transformers, "llama"), "llama", tmp_path / "a.gguf", keys={"block_count": 1})
    with pytest.raises(RecipeError, match=r"model\.num_hidden_layers"):
        import_folder(tmp_path / "a.gguf", tmp_path / "ours", Wanted(num_offsets=1))
    assert not (tmp_path / "ours").exists()


def _place(whole, name):
    """Where a file says what it has to say of a tensor: its type, and its offset."""
    begin = whole.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
    (num_axes,) = struct.unpack_from("<I", whole, begin)
    return begin + 4 + 8 * num_axes, begin + 8 + 8 * num_axes


@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.ffn_up.weight", "output_norm.weight"])
def test_tensors_at_odd_places_and_of_odd_types(name, whole, tmp_path):
    kind, offset = _place(whole, name)
    other = struct.unpack_from("<Q", whole, _place(whole, "blk.0.ffn_down.weight")[1])[0]
    for place, form, value, found in (
        (offset, "<Q", 2**63, "an end after"),
        (offset, "<Q", len(whole), "an end after"),
        (offset, "<Q", other, "same bytes"),
        (kind, "<I", 999, "type 999"),
        (kind, "<I", 24, "I8"),
        (kind, "<I", 15, "Q8_K"),
    ):
        content = bytearray(whole)
        struct.pack_into(form, content, place, value)
        assert found in refusal(written(tmp_path / "a.gguf", content)).found


def test_rows_of_no_whole_blocks(whole, tmp_path):
    content = bytearray(whole)
    struct.pack_into("<I", content, _place(whole, "token_embd.weight")[0], 12)  # Q4_K, in blocks of 256
    assert "whole blocks of 256" in refusal(written(tmp_path / "a.gguf", content)).expected


def test_values_that_are_not_finite(tmp_path):
    packed = np.full((13, 34), 0x7E, np.uint8)  # a scale that is no number
    model = model_of(transformers, "llama")
    save_gguf(model, "llama", tmp_path / "a.gguf", packed={"token_embd.weight": (packed, "Q8_0")})
    assert "token_embd.weight" in refusal(tmp_path / "a.gguf").found


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "link.gguf").symlink_to("nowhere")
    for name in ("fifo", "folder", "link", "none"):
        refusal(tmp_path / f"{name}.gguf")


@pytest.mark.parametrize("wanted", [{"family": "transformers"}, {"variant": "fp16"}, {"base": "llama"}])
def test_options_of_folders(wanted, whole, tmp_path):
    error = refusal(written(tmp_path / "a.gguf", whole), **wanted)
    assert error.expected == f"--{next(iter(wanted))} must belong to a folder"


def test_files_of_a_model_that_are_missing_or_another_s(tmp_path):
    for number, name in enumerate(("a", "b")):
        model = model_of(transformers, "llama", vocab_size=13 + number)
        save_gguf(model, "llama", tmp_path / f"{name}.gguf", split_max_tensors=8)
    first, second = (sorted(tmp_path.glob(f"{name}-*.gguf")) for name in ("a", "b"))
    second[0].rename(second[0].with_name("other.gguf"))
    assert "NAME-00001-of" in refusal(tmp_path / "other.gguf").expected
    first[1].write_bytes(first[2].read_bytes())
    assert "split.no" in refusal(first[0]).found
    first[1].unlink()
    assert first[1].name in refusal(first[0]).found


def test_without_the_package(whole, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "mtp_lightning[gguf]" in refusal(written(tmp_path / "a.gguf", whole)).hint


def test_the_command_tells_it_without_a_traceback(whole, tmp_path):
    path = written(tmp_path / "a.gguf", whole[:500])
    done = CliRunner().invoke(app, ["import", str(path), "--out", str(tmp_path / "ours")])
    assert done.exit_code == 3
    assert "as llama.cpp writes it" in done.output
    assert "Traceback" not in done.output
