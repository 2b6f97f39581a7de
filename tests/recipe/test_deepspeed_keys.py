"""Raw DeepSpeed keys are held against what the installed DeepSpeed reads, before anything is started."""

import json
import os
from pathlib import Path

import pytest

import mtp_lightning.recipe.rules.deepspeed as rules
from mtp_lightning.errors import RecipeError
from mtp_lightning.recipe import load_recipe
from tests.support.deepspeed_schema import installed_keys

PATH = Path(rules.__file__).with_name("deepspeed_keys.json")
QUICKSTART = Path(__file__).parents[2] / "recipes/quickstart.yaml"


def test_the_table_is_of_the_installed_deepspeed() -> None:
    text = json.dumps(installed_keys(), indent=1) + "\n"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        PATH.write_text(text)
    assert PATH.read_text() == text, f"{PATH} is of another DeepSpeed: UPDATE_GOLDEN=1 pytest {__file__}"


@pytest.mark.parametrize(
    ("raw", "path", "words"),
    [
        ("{comunication_data_type: fp32}", "comunication_data_type", ["nearest: communication_data_type"]),
        ("{zero_optimization: {reduce_buckt_size: 5}}", "zero_optimization.reduce_buckt_size", ["reduce_bucket_size."]),
        ("{reduce_bucket_size: 5}", "reduce_bucket_size", ["beneath zero_optimization"]),
        ("{zero_optimization: [1]}", "zero_optimization", ["a mapping of keys", "a list: [1]"]),
        ("{zero_optimization: null}", "zero_optimization", ["a mapping of keys", "null"]),
        ("{zero_optimization: true}", "zero_optimization", ["a mapping of keys"]),
        ("{zero_optimization: {reduce_bucket_size: x}}", "zero_optimization.reduce_bucket_size", ["a whole number"]),
        ("{zero_optimization: {reduce_bucket_size: 1.5}}", "zero_optimization.reduce_bucket_size", ["1.5"]),
        ("{zero_optimization: {overlap_comm: 3}}", "zero_optimization.overlap_comm", ["true or false or null"]),
        ("{zero_optimization: {sub_group_size: -1}}", "zero_optimization.sub_group_size", ["number >= 0", "-1"]),
        (
            "{zero_optimization: {offload_optimizer: {pin_memry: true}}}",
            "zero_optimization.offload_optimizer.pin_memry",
            ["offload_optimizer of DeepSpeed", "pin_memory"],
        ),
        ("{fp16: {loss_scal: 0}}", "fp16.loss_scal", ["loss_scale"]),
        ("{data_types: {grad_acum_dtype: fp32}}", "data_types.grad_acum_dtype", ["grad_accum_dtype"]),
        ("{prescale_gradients: 1}", "prescale_gradients", ["true or false"]),
        ("{qqq: 1}", "qqq", ["DeepSpeed does not read it"]),
        ("{'': 1}", "", ["the unknown name"]),
    ],
)
def test_a_key_that_deepspeed_would_not_take_is_refused(raw: str, path: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(QUICKSTART, [f"strategy.deepspeed={raw}"])
    (fault,) = caught.value.faults
    assert fault.path == f"strategy.deepspeed.{path}"
    assert not [word for word in words if word not in caught.value.__notes__[0]]


@pytest.mark.parametrize(
    "raw",
    [
        "{zero_optimization: {reduce_bucket_size: 5e8, overlap_comm: true, stage3_max_live_parameters: auto}}",
        "{zero_optimization: {prefetch_bucket_size: 5, stage3_prefetch_bucket_size: 5}}",
        "{zero_optimization: {offload_optimizer: {pin_memory: false, ratio: 1}}}",
        "{dump_state: false, data_types: {grad_accum_dtype: bf16}, fp16: {loss_scale: 128}}",
        "{comms_logger: {enabled: true}, wall_clock_breakdown: true, steps_per_print: 10, timers: {throughput: {}}}",
    ],
)
def test_keys_that_deepspeed_reads_are_taken(raw: str) -> None:
    assert load_recipe(QUICKSTART, [f"strategy.deepspeed={raw}"]).recipe.strategy.deepspeed
