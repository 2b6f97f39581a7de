"""DeepSpeed's configuration is a pure function of the recipe, recorded for recipes that people launch."""

import json
import os
from pathlib import Path

import pytest

from mtp_lightning.errors import RecipeError
from mtp_lightning.recipe import load_recipe
from mtp_lightning.training.strategies.zero_config import merged, zero_config
from tests.support.runs import ROOT

GOLDEN = ROOT / "tests/golden/zero_configs"
PAPER = ROOT / "recipes/paper"
CASES = {
    "0.3b_n4": ("0.3b_n4.yaml",),
    "1.3b_n4_zero2": ("1.3b_n4.yaml", "strategy.kind=zero2"),
    "13b_n4": ("13b_n4.yaml",),
    "13b_n4_fp32": ("13b_n4.yaml", "run.precision=fp32"),
    "13b_n4_fp16": ("13b_n4.yaml", "run.precision=fp16", "optimizer.max_grad_norm=null"),
    "13b_n4_offloaded": ("13b_n4.yaml", "strategy.offload_optimizer=cpu", "strategy.offload_parameters=cpu"),
    "13b_n4_nvme": ("13b_n4.yaml", "strategy.offload_optimizer=nvme", "strategy.nvme_path=/scratch"),
    "13b_n4_raw_keys": (
        "13b_n4.yaml",
        "strategy.deepspeed={zero_optimization: {reduce_bucket_size: 7, stage3_prefetch_bucket_size: 9}, "
        "wall_clock_breakdown: true}",
    ),
}


def test_every_recorded_configuration_has_a_case():
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_configuration_is_as_recorded(name):
    file, *overrides = CASES[name]
    recipe = load_recipe(PAPER / file, overrides).recipe
    text = json.dumps(zero_config(recipe), indent=2) + "\n"
    path = Path(GOLDEN / f"{name}.json")
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()
    assert zero_config(recipe) == zero_config(recipe)


def test_raw_keys_are_laid_over_key_by_key():
    assert merged({"a": {"b": 1, "c": {"d": 2}}}, {"a": {"c": {"e": 3}}}) == {"a": {"b": 1, "c": {"d": 2, "e": 3}}}
    assert merged({"a": {"b": 1}}, {"a": "auto"}) == {"a": "auto"}


def test_buckets_are_no_larger_than_the_model():
    small = load_recipe(PAPER / "13b_n4.yaml", ["debug.shrink=true"]).recipe
    assert zero_config(small)["zero_optimization"]["reduce_bucket_size"] < 1_000_000


@pytest.mark.parametrize("key", ["gradient_clipping: 1", "zero_optimization: {stage: 1}", "bf16: {enabled: false}"])
def test_a_raw_key_that_a_field_decides_is_refused_by_name(key):
    with pytest.raises(RecipeError) as caught:
        load_recipe(PAPER / "13b_n4.yaml", [f"strategy.deepspeed={{{key}}}"])
    [fault] = caught.value.faults
    assert fault.path == "strategy.deepspeed"
    assert key.split(":")[0] in fault.hint
