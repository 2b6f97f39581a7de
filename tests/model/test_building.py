"""A model that is built in low precision is the fp32 one, rounded: nothing else may hang on how it came about."""

import pytest
import torch

from mtp_lightning.model.mtp_model import build_model
from tests.support.architectures import architecture_recipe
from tests.support.tiny import HEAD_KINDS, tiny_recipe

RECIPES = {kind: lambda kind=kind: tiny_recipe(heads=HEAD_KINDS[kind]) for kind in HEAD_KINDS} | {
    "adapted": lambda: tiny_recipe(adapt={"lora": {"rank": 3}, "layer_mix": {}}),
    "gemma3_text": lambda: architecture_recipe("gemma3_text"),
    "deepseek_v3": lambda: architecture_recipe("deepseek_v3"),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", RECIPES)
def test_built_in_low_precision_is_rounded(name, dtype):
    if name in ("gemma3_text", "deepseek_v3"):
        pytest.importorskip("transformers", minversion="5.23")
    recipe = RECIPES[name]()
    rounded, built = build_model(recipe).to(dtype), build_model(recipe, dtype=dtype)
    for expected, found in (
        (dict(rounded.named_parameters()), dict(built.named_parameters())),
        (dict(rounded.named_buffers()), dict(built.named_buffers())),
    ):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert value.dtype == found[key].dtype
            assert torch.equal(value, found[key]), key
