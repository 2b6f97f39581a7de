"""Counts of models of transformers' classes, held against transformers and torch."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mtp_lightning.model.foreign_counts import layer_entries
from mtp_lightning.planner.counts import parameter_counts
from mtp_lightning.planner.flops import flops_per_position

transformers = pytest.importorskip(
    "transformers", minversion="5.23", reason="needs transformers: pip install 'mtp_lightning[judge]'"
)
from tests.support.architectures import architecture_recipe  # noqa: E402

NAMES = ["gemma2", "mixtral", "gpt2", "deepseek_v3", "phi3"]


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_of_one_offset_are_those_of_transformers(name):
    recipe = architecture_recipe(name, heads={"num_offsets": 1})
    config = transformers.AutoConfig.for_model(**recipe.model.hf_config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    buffers = sum(one.numel() for key, one in model.named_buffers() if key in model.state_dict())
    assert parameter_counts(recipe).total == sum(one.numel() for one in model.parameters()) + buffers


@pytest.mark.parametrize("name", NAMES)
def test_products_with_matrices_are_those_that_torch_counts(name):
    recipe = architecture_recipe(name, heads={"num_offsets": 1})
    config = transformers.AutoConfig.for_model(**recipe.model.hf_config)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.set_experts_implementation("eager")  # torch counts no grouped products
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(3, 11)[None])
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "bmm" not in str(op))
    matrix = config.vocab_size * config.hidden_size
    expected = 2 * 8 * (sum(layer_entries(recipe.model)) + matrix)
    assert counted == pytest.approx(expected, rel=0.02)  # rotary tables are products, too


def test_experts_that_a_position_is_not_sent_to_cost_nothing():
    few, many = (
        architecture_recipe("mixtral", settings={"num_local_experts": num, "num_experts": num}) for num in (4, 8)
    )
    routers = 6 * 32 * 4 * 5  # of three layers and two modules, four more rows of width 32, forward and backward
    assert parameter_counts(many).total > parameter_counts(few).total
    assert flops_per_position(many) - flops_per_position(few) == pytest.approx(routers, abs=6 * 5)


def test_a_draft_vocabulary_that_no_run_has_chosen_yet_can_be_planned():
    recipe = architecture_recipe("gemma2", heads={"num_offsets": 3, "kind": "sequential", "draft_vocabulary": 16})
    whole = architecture_recipe("gemma2", heads={"num_offsets": 3, "kind": "sequential"})
    assert parameter_counts(recipe) == parameter_counts(whole)
    assert flops_per_position(recipe) < flops_per_position(whole)
