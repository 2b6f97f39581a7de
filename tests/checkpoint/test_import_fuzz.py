"""Files of settings changed at random: imported, or refused in words; never a traceback."""

import copy
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mtp_lightning.checkpoint.huggingface.import_model import Wanted, import_folder
from mtp_lightning.errors import MtpError
from tests.checkpoint.foreign import SETTINGS, write_folder, write_shards

INDEX = "model.safetensors.index.json"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mimo", "gpt_neox")
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MORE: dict[str, Any] = {
    "head_dim": 4,
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 2,
    "layer_types": ["full_attention"] * 3,
    "rope_parameters": ROPE,
    "rope_scaling": None,
    "partial_rotary_factor": 1.0,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "num_nextn_predict_layers": 0,
    "quantization_config": None,
    "torch_dtype": "bfloat16",
    "original_max_position_embeddings": 32,
    "rotary_pct": 0.25,
}
ADAPTER: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": None,
    "r": 2,
    "lora_alpha": 4,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 4},
    "use_rslora": False,
    "init_lora_weights": True,
    "use_dora": False,
    "target_modules": ["q_proj"],
}
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 10**9, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan")),
    *(float("inf"), "", "0", "4", "silu", "x" * 300, "x" * 10**5, "\0", "\ud800", "../../x", "a\nb", "\x1b[2J"),
    *([], [0], [[]], [None], ["x"], [10**9], {}, {"": ""}, {"type": "linear"}, {"rope_type": "llama3"}, {"a": {}}),
    *({"type": "linear", "factor": 0}, {"rope_type": [1]}, {"rope_theta": "x"}, list(range(1000))),
]
BYTES = [
    b"\0",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"[" * 10**5,
    b"{" * 99,
    b'"',
    b"}",
    b",",
    b"9" * 5000,
    b"\xed\xa0\x80",
    b"NaN",
]


def mutated(value: Any, draw: random.Random) -> Any:
    """Change one place of a tree."""
    value = copy.deepcopy(value)
    place = value
    while True:
        keys = [*place] if isinstance(place, dict) else [*range(len(place))]
        if not keys:
            return value
        key = draw.choice(keys)
        if isinstance(place[key], dict | list) and draw.random() < 0.6:
            place = place[key]
            continue
        how = draw.random()
        if how < 0.15:
            del place[key]
        elif how < 0.25 and isinstance(place, dict):
            place[draw.choice(["x", "", "quantization", "\ud800", f"{key} "])] = place.pop(key)
        else:
            place[key] = draw.choice(VALUES)
        return value


def text_of(value: Any, draw: random.Random) -> bytes:
    """Write a tree as JSON, sometimes with bytes in it that do not belong there."""
    text = json.dumps(value).encode()
    if draw.random() < 0.2:
        cut = draw.randrange(len(text))
        text = text[:cut] + draw.choice(BYTES) + text[cut + draw.choice([0, 1, 40]) :]
    return text


def write_adapter(folder: Path, base: Path) -> dict[str, Any]:
    folder.mkdir()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {f"{name}A.weight": torch.ones(2, 16), f"{name}B.weight": torch.ones(16, 2)}
    safetensors.torch.save_file(factors, folder / "adapter_model.safetensors")
    return ADAPTER | {"base_model_name_or_path": str(base)}


def try_mutations(tmp_path: Path, count: int, seed: int) -> tuple[int, int]:
    """Import folders with settings changed at random; count those that are taken and those that are refused."""
    draw, out, refusals = random.Random(seed), tmp_path / "ours", []
    whole, shards = write_folder(tmp_path / "whole"), write_shards(tmp_path / "shards", 2)
    adapter = write_adapter(tmp_path / "adapter", whole)
    index = json.loads((shards / INDEX).read_text())
    for number in range(count):
        if (kind := number % 7) == 0:
            path, value = tmp_path / "adapter/adapter_config.json", adapter
        elif kind == 1:
            path, value = shards / INDEX, index
        else:
            family = draw.choice(FAMILIES)
            path, value = whole / "config.json", SETTINGS | MORE | {"model_type": family}
        good = path.read_bytes() if path.exists() else b""
        for _ in range(draw.choice([1, 1, 2])):
            value = mutated(value, draw)
        path.write_bytes(content := text_of(value, draw))
        started = time.perf_counter()
        try:
            import_folder(path.parent, out, Wanted(num_offsets=1))
        except MtpError as error:
            refusals.append((error.expected, error.found, error.hint))
        except Exception as error:
            raise AssertionError(f"mutation {number} of seed {seed}: {content[:500]!r}") from error
        assert time.perf_counter() - started < 20
        assert [*tmp_path.glob("*.partial")] == []
        shutil.rmtree(out, ignore_errors=True)
        path.write_bytes(good)
    assert not [parts for parts in refusals if not all(parts) or len(str(parts)) > 2000]
    return count - len(refusals), len(refusals)


@pytest.mark.timeout(60)
def test_some_settings_changed_at_random(tmp_path: Path) -> None:
    taken, refused = try_mutations(tmp_path, 42, seed=0)
    assert taken > 2
    assert refused > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_settings_changed_at_random(seed: int, tmp_path: Path) -> None:
    taken, refused = try_mutations(tmp_path, 350, seed)
    assert taken > 20
    assert refused > 100
