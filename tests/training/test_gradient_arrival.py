"""The gradient-arrival check stops runs whose heads would silently never change."""

import pytest
import torch

from mtp_lightning.errors import TrainingError
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe.schema.root import OptimizerSection
from mtp_lightning.training.step.gradient_checks import NonzeroGradientCheck
from mtp_lightning.training.step.optimizer import build_optimizer, rates_by_role
from mtp_lightning.training.strategies.param_shards import whole_shards
from tests.support.covering import some_of
from tests.support.tiny import HEAD_KINDS, gradients_of, tiny_model, tiny_recipe, tiny_rows

ALL = [1.0, 1.0, 1.0, 1.0]
RATES = rates_by_role(OptimizerSection(), OptimizerSection().lr)


def arrival(model):
    return NonzeroGradientCheck(model, Ranks())


def shards(model):
    return whole_shards(model.named_parameters(), torch.optim.SGD(model.parameters()))


def build(kind="parallel", weights=None, **objective):
    recipe = tiny_recipe(heads=HEAD_KINDS[kind], objective=objective)
    model = tiny_model(recipe)
    gradients_of(model, recipe, tiny_rows(recipe, 2), weights)
    return model


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_a_sound_step_settles_every_parameter(kind):
    model = build(kind)
    watch = arrival(model)
    assert len(watch.pending) == len(list(model.parameters()))
    watch.before_step(ALL, shards(model))
    build_optimizer(model, OptimizerSection()).step()
    watch.after_step(shards(model), RATES)
    assert not watch.pending


@pytest.mark.parametrize("kind", some_of(HEAD_KINDS, one_in=2))
def test_offsets_without_weight_wait_until_they_are_switched_on(kind):
    weights = [1.0, 1.0, 0.0, 0.0]
    model = build(kind, weights)
    watch = arrival(model)
    watch.before_step(weights, shards(model))
    build_optimizer(model, OptimizerSection()).step()
    watch.after_step(shards(model), RATES)
    waiting = set(watch.pending)
    owned = {name for name, p in model.named_parameters() if any(p is q for k in (3, 4) for q in own(model, k))}
    shared = {name for name, p in model.named_parameters() if any(p is q for k in (1, 2) for q in own(model, k))}
    if kind != "anticausal":  # its main head reads the far ones, so all of them train at once
        assert waiting == owned - shared
    if waiting:
        with pytest.raises(TrainingError, match="no gradient"):
            watch.before_step(ALL, shards(model))


def own(model, offset):
    modules = model.heads.modules_of(offset)
    return [*(p for module in modules for p in module.parameters()), *model.unembedding.parameters_of(offset)]


def test_a_lost_gradient_is_named():
    model = build()
    lost = model.heads.blocks[2][0].mlp.up_proj.weight
    lost.grad = None
    with pytest.raises(TrainingError, match="no gradient: heads.blocks.2.0.mlp.up_proj.weight"):
        arrival(model).before_step(ALL, shards(model))
    lost.grad = torch.zeros_like(lost)
    with pytest.raises(TrainingError, match="gradient zero: heads.blocks.2.0.mlp.up_proj.weight"):
        arrival(model).before_step(ALL, shards(model))
    lost.grad[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="gradient not finite: heads.blocks.2.0.mlp.up_proj.weight"):
        arrival(model).before_step(ALL, shards(model))


def test_a_parameter_the_optimizer_does_not_hold_is_named():
    model = build()
    optimizer = build_optimizer(model, OptimizerSection())
    optimizer.param_groups = [group for group in optimizer.param_groups if group["role"] != "heads"]
    watch = arrival(model)
    watch.before_step(ALL, shards(model))
    optimizer.step()
    with pytest.raises(TrainingError, match="no change of heads.blocks.0"):
        watch.after_step(shards(model), RATES)


def test_a_detached_head_is_caught(monkeypatch):
    recipe = tiny_recipe()
    model = tiny_model(recipe)
    forward = type(model.heads).forward
    monkeypatch.setattr(type(model.heads), "forward", lambda *arguments: forward(*arguments).detach())
    gradients_of(model, recipe, tiny_rows(recipe, 2))
    with pytest.raises(TrainingError, match="gradient zero: trunk.embed_tokens.weight.*no gradient: heads.blocks.0"):
        arrival(model).before_step(ALL, shards(model))


def step(watch, model, recipe, rows, rate=1e-3, optimizer=None):
    """One step of training, watched."""
    model.zero_grad()
    gradients_of(model, recipe, rows)
    optimizer = optimizer or build_optimizer(model, OptimizerSection())
    for group in optimizer.param_groups:
        group["lr"] = rate
    watch.before_step(ALL, shards(model))
    optimizer.step()
    watch.after_step(shards(model), rates_by_role(OptimizerSection(), rate))
    return optimizer


def test_weights_too_large_to_show_a_tiny_rate_are_looked_at_again(capsys):
    recipe = tiny_recipe(heads=HEAD_KINDS["parallel"])
    model, rows = tiny_model(recipe).float(), tiny_rows(recipe, 2)
    large = [p for name, p in model.named_parameters() if p.dim() == 1]
    for parameter in large:
        parameter.data.fill_(8.0)
    watch = arrival(model)
    optimizer = step(watch, model, recipe, rows, rate=1e-7)
    assert len(watch.pending) == len(large)
    step(watch, model, recipe, rows, rate=1e-7, optimizer=optimizer)  # undecided once more
    for _ in range(2):
        assert len(watch.pending) == len(large)
        step(watch, model, recipe, rows, rate=1e-3, optimizer=optimizer)
    assert watch.pending == []
    assert capsys.readouterr().out.count("too small to show in") == 1


def test_a_tiny_rate_hides_no_parameter_that_the_optimizer_does_not_hold():
    recipe = tiny_recipe(heads=HEAD_KINDS["parallel"])
    model, rows = tiny_model(recipe).float(), tiny_rows(recipe, 2)
    optimizer = build_optimizer(model, OptimizerSection())
    optimizer.param_groups = [group for group in optimizer.param_groups if group["role"] != "heads"]
    with pytest.raises(TrainingError, match=r"no change of heads.blocks.0"):
        step(arrival(model), model, recipe, rows, rate=1e-6, optimizer=optimizer)


def test_moments_of_earlier_steps_may_hold_weights_still_for_a_step():
    """A run goes on, and its new gradients happen to cancel what the optimizer remembers."""
    recipe = tiny_recipe(heads=HEAD_KINDS["parallel"])
    model, rows = tiny_model(recipe).float(), tiny_rows(recipe, 2)
    optimizer = build_optimizer(model, OptimizerSection(betas=[0.5, 0.95], weight_decay=0.0))
    step(arrival(model), model, recipe, rows, optimizer=optimizer)
    gradients_of(model, recipe, rows)
    for parameter in model.parameters():
        optimizer.state[parameter]["exp_avg"].copy_(-parameter.grad)
    watch = NonzeroGradientCheck(model, Ranks(), has_moments=True)
    step(watch, model, recipe, rows, optimizer=optimizer)
    assert len(watch.still) > len(list(model.parameters())) / 2
    step(watch, model, recipe, rows, optimizer=optimizer)
    assert not watch.pending


def test_moments_hide_no_parameter_that_the_optimizer_does_not_hold():
    recipe = tiny_recipe(heads=HEAD_KINDS["parallel"])
    model, rows = tiny_model(recipe), tiny_rows(recipe, 2)
    optimizer = build_optimizer(model, OptimizerSection())
    optimizer.param_groups = [group for group in optimizer.param_groups if group["role"] != "heads"]
    watch = NonzeroGradientCheck(model, Ranks(), has_moments=True)
    for _ in range(2**5 - 1):
        step(watch, model, recipe, rows, optimizer=optimizer)
    with pytest.raises(TrainingError, match=r"no change of heads.blocks.0"):
        step(watch, model, recipe, rows, optimizer=optimizer)


def test_what_lies_behind_matrices_of_zeros_is_given_time():
    recipe = tiny_recipe(heads=HEAD_KINDS["parallel"])
    model, rows = tiny_model(recipe), tiny_rows(recipe, 2)
    layer = model.trunk.layers[0]
    for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
        matrix.weight.data.zero_()
    watch = arrival(model)
    optimizer = step(watch, model, recipe, rows)
    behind = set(watch.pending)
    assert "trunk.layers.0.self_attn.q_proj.weight" in behind
    assert "trunk.layers.0.mlp.up_proj.weight" in behind
    assert all(name.startswith("trunk.layers.0.") for name in behind)
    step(watch, model, recipe, rows, optimizer=optimizer)
    assert watch.pending == []


def test_a_gradient_that_never_arrives_is_named_although_there_are_zeros():
    recipe = tiny_recipe(heads=HEAD_KINDS["parallel"])
    model, rows = tiny_model(recipe), tiny_rows(recipe, 2)
    lost = model.trunk.layers[0].mlp
    for matrix in (lost.down_proj, lost.up_proj, lost.gate_proj):
        matrix.weight.data.zero_()  # a product of zeros: none of the three ever moves
    watch = arrival(model)
    optimizer = step(watch, model, recipe, rows)

    def go_on():
        for _ in range(2**7):
            step(watch, model, recipe, rows, optimizer=optimizer)

    with pytest.raises(TrainingError, match=r"gradient zero: .*trunk.layers.0.mlp.gate_proj.weight"):
        go_on()
