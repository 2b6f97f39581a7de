"""Strategies that lose gradients stop the run by its own checks; under ZeRO-2 and 3 gradients are sharded at once."""

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mtp_lightning.errors import TrainingError
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe.layer_counts import num_trunk_layers
from mtp_lightning.training.step.gradient_checks import PROJECTED_ENTRIES, GradientChecksum, _project
from mtp_lightning.training.strategies.param_shards import ParamShard, steps_of, whole_shards
from mtp_lightning.training.strategies.zero import ZeroStrategy
from tests.support.covering import some_of
from tests.support.ranked import on_ranks
from tests.support.tiny import HEAD_KINDS, gradients_of, tiny_model, tiny_recipe, tiny_rows

pytestmark = pytest.mark.xdist_group("strategies")  # the slow ones too: they share what was found
NO_GRADIENT = "must receive a finite, non-zero gradient"
NOT_THE_SUM = "must be the sum of those that the backward passes compute"
ONE_LAYER, UNEMBEDDING = 7_744, 101 * 32 + 32  # entries of a head layer of gradient_peak's model; V x D and final norm


def broken(num_ranks):
    """What stopped each cell of strategies broken on purpose, and how far off its gradients were, by breakage."""
    lines = on_ranks("tests.support.broken_strategies", num_ranks, str(num_ranks)).splitlines()
    by_breakage = json.loads(lines[-1]).items()
    return {name: {tuple(cell): (failure, error) for *cell, failure, error in cells} for name, cells in by_breakage}


@pytest.fixture(scope="module", params=[pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 2)])
def found(request):
    return broken(request.param)


def test_zero_1_and_2_build_in_the_precision_of_the_run():
    for kind, precision, dtype in (("zero1", "bf16", torch.bfloat16), ("zero2", "fp16", torch.float16)):
        recipe = tiny_recipe(strategy={"kind": kind}, run={"precision": precision})
        model = ZeroStrategy(recipe, torch.device("cpu")).build_model(recipe)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_a_boundary_left_alone_stops_the_run(found):
    for (stage, backward_order, _), (failure, error) in found["leave_boundary_alone"].items():
        if backward_order == "joint":  # with one backward pass per step there is nothing to gather
            assert not failure
            assert error < 1e-5
        elif backward_order == "sequential" and stage != "zero3":
            assert NO_GRADIENT in failure
            assert "heads.blocks.0" in failure
        else:
            assert NOT_THE_SUM in failure
            assert "trunk.embed_tokens.weight" in failure or "unembedding.lm_heads.0.weight" in failure


def test_zero3_without_adding_up_stops_the_run(found):
    cells = found["let_zero3_overwrite"]
    wrong = {cell for cell, (failure, _) in cells.items() if NOT_THE_SUM in failure}
    assert wrong == {cell for cell in cells if cell[0] == "zero3" and cell[1] != "joint"}
    assert not [failure for cell, (failure, _) in cells.items() if cell not in wrong and failure]


def test_without_the_check_of_sums_such_runs_go_on(found):
    cells = found["check_nothing"]
    wrong = {cell: error for cell, (failure, error) in cells.items() if not failure and cell[1] != "joint"}
    assert ("zero3", "sequential", "shared") in wrong
    assert min(wrong.values()) > 0.5


def test_the_comparison_sees_a_ten_thousandth(found):
    cells = found["scale_gradients"].values()
    assert not [failure for failure, _ in cells if failure]  # rounding, for all that the checks know
    assert all(0.9e-4 < error < 1e-2 for _, error in cells)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_no_rank_holds_gradients_of_two_heads(stage):
    most_entries, most_heads, most_after_a_pass = peak(stage, bucket=4_000)
    assert most_heads == 1
    assert most_after_a_pass == 0
    assert most_entries <= ONE_LAYER + UNEMBEDDING


@pytest.mark.slow
def test_zero1_does_hold_all_gradients():
    """The count above can fail."""
    most_entries, most_heads, most_after_a_pass = peak("zero1", bucket=4_000)
    assert most_heads == 4
    assert most_after_a_pass == most_entries > 5 * ONE_LAYER


def peak(stage, bucket):
    return json.loads(on_ranks("tests.support.gradient_peak", 2, stage, str(bucket)).splitlines()[-1])


def after_a_step(kind="parallel", dtype=torch.float32, **sections):
    recipe = tiny_recipe(heads=HEAD_KINDS[kind], **sections)
    model = tiny_model(recipe, dtype)
    watch = GradientChecksum(model, Ranks())
    gradients_of(model, recipe, tiny_rows(recipe, recipe.batch.global_batch_size))
    return model, watch


def shards(model):
    return whole_shards(model.named_parameters(), torch.optim.SGD(model.parameters()))


@pytest.mark.parametrize("kind", some_of(HEAD_KINDS, one_in=2, first=1))
def test_a_sound_step_is_its_sum_and_ends_the_watch(kind):
    model, watch = after_a_step(kind, batch={"global_batch_size": 6, "micro_batch_size": 2})
    assert watch.hooks
    watch.compare(shards(model))
    assert not watch.hooks
    assert not any(p._backward_hooks for p in model.parameters())
    next(model.parameters()).grad.zero_()
    watch.compare(shards(model))  # nobody looks any more


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.9, 1.1, 4.0, -1.0])
def test_a_parameter_whose_gradient_is_another_is_named(factor):
    model, watch = after_a_step()
    model.unembedding.lm_heads[0].weight.grad.mul_(factor)
    with pytest.raises(TrainingError, match=r"another one of unembedding.lm_heads.0.weight\."):
        watch.compare(shards(model))


def test_rounding_to_bf16_is_no_loss():
    model, watch = after_a_step(dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.grad *= 1 + 2**-8 * torch.rand(parameter.shape)
    watch.compare(shards(model))


class Launches(TorchDispatchMode):
    """Counts operations, and scalars that the host reads one by one."""

    def __init__(self):
        super().__init__()
        self.number = self.scalars_read = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        self.scalars_read += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def shard_of_step(step):
    return ParamShard("name", torch.Size([1]), 0, torch.ones(1), None, {}, step, is_trainable=True)


def test_a_skipped_step_does_not_count():
    model, watch = after_a_step()
    watch.forget()
    with pytest.raises(TrainingError, match="trunk.embed_tokens.weight"):
        watch.compare(shards(model))
    model, watch = after_a_step()
    watch.forget()
    model.zero_grad()
    recipe = tiny_recipe()
    gradients_of(model, recipe, tiny_rows(recipe, 2, seed=1))
    watch.compare(shards(model))


def test_projections_of_shards_add_up(monkeypatch):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = _project("name", values, 0)
    monkeypatch.setitem(PROJECTED_ENTRIES, "cpu", 64)
    parts = [_project("name", values[start:stop], start) for start, stop in ((0, 333), (333, 334), (334, 1000))]
    torch.testing.assert_close(sum(parts), whole)
    assert whole[2] == pytest.approx(float(values.square().sum()))
    assert not torch.allclose(_project("other", values, 0)[:2], whole[:2])


def test_a_projection_on_a_device_takes_few_launches():
    """Those of the paper's 13 B model, whose largest matrix has 164 M entries, took half a million (meta: a device)."""
    with Launches() as launches:
        _project("name", torch.empty(5120 * 32_000, device="meta"), 0)
    assert launches.number <= 15 * 40


def test_steps_of_shards_are_read_at_once():
    steps = [torch.tensor(3.0), None, torch.tensor(5.0), torch.tensor(7.0, dtype=torch.float64)]
    shards = [shard_of_step(step) for step in steps]
    with Launches() as launches:
        assert steps_of(shards) == [3.0, None, 5.0, 7.0]
    assert not launches.scalars_read


def test_the_peak_model_has_this_layer():
    recipe = tiny_recipe(model={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "vocab_size": 101})
    model = tiny_model(recipe)
    assert num_trunk_layers(recipe) > 1
    assert sum(p.numel() for p in model.heads.blocks[1].parameters()) == ONE_LAYER
    assert sum(p.numel() for p in model.unembedding.parameters()) == UNEMBEDDING
