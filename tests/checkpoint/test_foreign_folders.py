"""Folders of models that have no trunk here, as transformers saves them: the same scores, and the same folder again."""

import json

import pytest
import torch

from mtp_lightning.checkpoint.convert.load_model import load_model
from mtp_lightning.checkpoint.export.write import export_model
from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.errors import CheckpointError
from mtp_lightning.model.transformers_library import library
from tests.checkpoint.runs import assert_same_tensors, stored
from tests.support.architectures import COMMON, SETTINGS, settings_of
from tests.support.covering import some_of

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[judge]'"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
TOKENS = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def saved(folder, settings, *, dtype=torch.float32, **saving):
    """Save a random model of some settings, with noise on every parameter and buffer that is saved; return it."""
    torch.manual_seed(0)
    config = library().AutoConfig.for_model(**settings)
    return save(folder, library().AutoModelForCausalLM.from_config(config), dtype=dtype, **saving)


@torch.no_grad()
def save(folder, model, *, dtype=torch.float32, **saving):
    kept = model.state_dict(keep_vars=True)
    for value in {id(one): one for one in kept.values()}.values():
        if value.is_floating_point():
            value += 0.1 * torch.randn(value.shape)
    model = model.eval() if dtype == torch.float32 else model.eval().to(dtype)
    model.save_pretrained(folder, **saving)
    return model


@torch.no_grad()
def scores(folder):
    model = load_model(folder)[1]
    padded = torch.nn.functional.pad(TOKENS, (0, model.num_offsets))
    return model.unembedding.logits(1, model.hidden_states(padded, torch.zeros_like(padded))[1])


def assert_same_settings(folder, other):
    told = [library().AutoConfig.from_pretrained(one).to_dict() | {"_name_or_path": ""} for one in (folder, other)]
    assert told[0] == told[1]


@pytest.mark.parametrize("name", some_of(SETTINGS, one_in=4))
def test_the_main_head_scores_as_in_transformers_and_goes_out_as_it_came(name, tmp_path):
    with torch.no_grad():
        expected = saved(tmp_path / "hf", settings_of(name))(TOKENS).logits
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted(num_offsets=3, kind="sequential", family="transformers"))
    assert expected.std() > 0.3
    torch.testing.assert_close(scores(tmp_path / "ours"), expected, rtol=1e-5, atol=1e-5)
    export_model(tmp_path / "ours", tmp_path / "back")
    assert_same_tensors(stored(tmp_path / "back"), stored(tmp_path / "hf"))
    assert_same_settings(tmp_path / "back", tmp_path / "hf")


@pytest.mark.parametrize("name", some_of(["qwen3_moe", "gpt2", "gemma2", "deepseek_v3"], one_in=2))
def test_shards_and_half_precision_keep_their_bits(name, tmp_path):
    saved(tmp_path / "hf", settings_of(name), dtype=torch.bfloat16, max_shard_size="6KB")
    assert len([*(tmp_path / "hf").glob("*.safetensors")]) > 3
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted())
    export_model(tmp_path / "ours", tmp_path / "back", dtype="bf16")
    assert_same_tensors(stored(tmp_path / "back"), stored(tmp_path / "hf"))
    assert_same_settings(tmp_path / "back", tmp_path / "hf")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gemma2", "parallel"),
        ("bamba", "parallel"),
        ("nemotron_h", "parallel"),
        ("falcon_h1", "parallel"),
        ("mamba2", "recursive"),
        ("recurrent_gemma", "parallel"),
        ("mixtral", "recursive"),
        ("gpt2", "chained"),
        ("falcon", "medusa"),
    ],
)
def test_heads_start_as_copies_of_the_last_layer_of_any_class(name, kind, tmp_path):
    with torch.no_grad():
        expected = saved(tmp_path / "hf", settings_of(name))(TOKENS).logits
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted(num_offsets=3, kind=kind))
    torch.testing.assert_close(scores(tmp_path / "ours"), expected, rtol=1e-5, atol=1e-5)
    report = json.loads((tmp_path / "ours/import.json").read_text())["parameters"]
    copied = {told["from"] for told in report.values() if told["how"] == "copied"}
    last = settings_of(name).get("num_hidden_layers", 3) - 1
    assert all(f".{last}." in source or "norm" in source or "ln_f" in source for source in copied)
    assert bool(copied) == (kind != "medusa")


def test_a_trunk_here_comes_first_and_transformers_takes_what_it_does_not_cover(tmp_path):
    saved(tmp_path / "plain", settings_of("llama", attention_bias=False, mlp_bias=False))
    model = saved(tmp_path / "window", settings_of("mistral"))
    for name, family in (("plain", "llama"), ("window", "transformers")):
        import_folder(tmp_path / name, tmp_path / f"{name}-ours", Wanted(num_offsets=2))
        assert load_model(tmp_path / f"{name}-ours")[0].model.family == family
    assert "sliding_window of 5" in json.loads((tmp_path / "window-ours/import.json").read_text())["notes"][0]
    with torch.no_grad():
        torch.testing.assert_close(scores(tmp_path / "window-ours"), model(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_infinite_settings_come_in_and_go_out_as_transformers_writes_them(tmp_path):
    settings = settings_of("phi3", final_limit=float("inf"))
    expected = saved(tmp_path / "hf", settings)(TOKENS).logits
    assert '"__float__": "Infinity"' in (tmp_path / "hf/config.json").read_text()
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted(num_offsets=2))
    torch.testing.assert_close(scores(tmp_path / "ours"), expected.detach(), rtol=1e-5, atol=1e-5)
    export_model(tmp_path / "ours", tmp_path / "back")
    assert library().AutoConfig.from_pretrained(tmp_path / "back").final_limit == float("inf")


@pytest.mark.parametrize(("name", "family"), [("gpt2", None), ("llama", None), ("llama", "transformers")])
def test_code_in_a_folder_of_a_known_type_is_not_run_and_it_is_said(name, family, tmp_path):
    saved(tmp_path / "hf", settings_of(name))
    told = json.loads((tmp_path / "hf/config.json").read_text())
    told["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (tmp_path / "hf/config.json").write_text(json.dumps(told))
    (tmp_path / "hf/own.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted(family=family))
    notes = json.loads((tmp_path / "ours/import.json").read_text())["notes"]
    assert f"(auto_map) is not run: what is known here of model_type {name} is what counts" in notes[0]
    assert not (tmp_path / "run").exists()
    assert "auto_map" not in (tmp_path / "ours/recipe.yaml").read_text()


def test_a_text_part_that_is_saved_alone_comes_in_as_what_computes_the_same(tmp_path):
    """Emu3's type of text has no class of its own among those that transformers finds by a folder's type."""
    text = COMMON | {"pad_token_id": 0}
    seeing = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "hidden_size": 32}
    settings = {"model_type": "emu3", "text_config": text, "vq_config": seeing, "vocabulary_map": {"<image>": 60}}
    with torch.no_grad():
        expected = saved(tmp_path / "hf", settings)(TOKENS).logits
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "emu3_text_model"
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted(num_offsets=2))
    torch.testing.assert_close(scores(tmp_path / "ours"), expected, rtol=1e-5, atol=1e-5)


def test_sizes_for_each_layer_are_settings_and_what_is_refused_is_said(tmp_path):
    """Gemma 3n lists its inner widths; it is refused for what its layers read."""
    settings = COMMON | {"head_dim": 8, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    settings |= {"model_type": "gemma3n_text", "vocab_size_per_layer_input": 61, "sliding_window": 8}
    saved(tmp_path / "hf", settings)
    assert json.loads((tmp_path / "hf/config.json").read_text())["intermediate_size"] == [48, 48, 48]
    with pytest.raises(CheckpointError, match=r"read the tokens besides the states \(hidden_size_per_layer_input: 8\)"):
        import_folder(tmp_path / "hf", tmp_path / "ours", Wanted(num_offsets=2))


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "head_dim": 8,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
    "patch_size": 14,
}
SEEN = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
IDS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
WRAPPERS = {
    "Gemma3": {
        "text_config": SMALL | {"sliding_window": 8},
        "vision_config": VISION,
        "image_token_id": 60,
        "mm_tokens_per_image": 4,
    },
    "Mistral3": {
        "text_config": SMALL | {"model_type": "mistral", "sliding_window": None},
        "vision_config": VISION | {"model_type": "pixtral"},
        "image_token_index": 60,
    },
    "Qwen2_5_VL": {
        "text_config": {n: v for n, v in SMALL.items() if n != "head_dim"}
        | {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}},
        "vision_config": SEEN,
        **IDS,
    },
    "Qwen3VL": {
        "text_config": SMALL | {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
        "vision_config": SEEN | {"deepstack_visual_indexes": [0]},
        **IDS,
    },
    "Llava": {
        "text_config": SMALL | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model"},
        "image_token_index": 60,
    },
    "Llama4": {
        "text_config": SMALL
        | {"num_local_experts": 2, "intermediate_size_mlp": 48, "moe_layers": [1], "no_rope_layers": [1, 0]}
        | {"attention_chunk_size": 8},
        "vision_config": VISION
        | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "pixel_shuffle_ratio": 0.5},
        "image_token_index": 60,
    },
}
OWN = {"Mistral3": "mistral", "Llava": "llama", "Qwen2_5_VL": "qwen2", "Qwen3VL": "qwen3"}


@pytest.mark.parametrize("name", some_of(WRAPPERS, one_in=4))
def test_of_a_model_that_sees_the_text_part_comes_in_by_name(name, tmp_path):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**WRAPPERS[name])
    kind = f"{name}ForConditionalGeneration"
    model = save(tmp_path / "hf", getattr(transformers, kind)(config))
    import_folder(tmp_path / "hf", tmp_path / "ours", Wanted(num_offsets=2))
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(scores(tmp_path / "ours"), expected, rtol=1e-5, atol=1e-5)
    assert load_model(tmp_path / "ours")[0].model.family == OWN.get(name, "transformers")
    assert f"The text part of {kind}" in json.loads((tmp_path / "ours/import.json").read_text())["notes"][0]
    export_model(tmp_path / "ours", tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
