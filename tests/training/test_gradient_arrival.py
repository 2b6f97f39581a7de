"""The gradient-arrival check stops runs whose heads would silently never change."""

import pytest
import torch

from mtp_lightning.errors import TrainingError
from mtp_lightning.ranks import Ranks
from mtp_lightning.recipe.sections import OptimizerSection
from mtp_lightning.training.checks import GradientArrival
from mtp_lightning.training.fragments import whole_fragments
from mtp_lightning.training.optimizer import build_optimizer
from tests.support.tiny import HEAD_KINDS, gradients_of, tiny_model, tiny_recipe, tiny_rows

ALL = [1.0, 1.0, 1.0, 1.0]


def arrival(model):
    return GradientArrival(model, Ranks())


def fragments(model):
    return whole_fragments(model.named_parameters(), torch.optim.SGD(model.parameters()))


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
    watch.before_step(ALL, fragments(model))
    build_optimizer(model, OptimizerSection()).step()
    watch.after_step(fragments(model))
    assert not watch.pending


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_offsets_without_weight_wait_until_they_are_switched_on(kind):
    weights = [1.0, 1.0, 0.0, 0.0]
    model = build(kind, weights)
    watch = arrival(model)
    watch.before_step(weights, fragments(model))
    build_optimizer(model, OptimizerSection()).step()
    watch.after_step(fragments(model))
    waiting = set(watch.pending)
    owned = {name for name, p in model.named_parameters() if any(p is q for k in (3, 4) for q in own(model, k))}
    shared = {name for name, p in model.named_parameters() if any(p is q for k in (1, 2) for q in own(model, k))}
    if kind != "anticausal":  # its main head reads the far ones, so all of them train at once
        assert waiting == owned - shared
    if waiting:
        with pytest.raises(TrainingError, match="no gradient"):
            watch.before_step(ALL, fragments(model))


def own(model, offset):
    modules = model.heads.modules_of(offset)
    return [*(p for module in modules for p in module.parameters()), *model.unembedding.parameters_of(offset)]


def test_a_lost_gradient_is_named():
    model = build()
    lost = model.heads.blocks[2][0].mlp.up_proj.weight
    lost.grad = None
    with pytest.raises(TrainingError, match="no gradient: heads.blocks.2.0.mlp.up_proj.weight"):
        arrival(model).before_step(ALL, fragments(model))
    lost.grad = torch.zeros_like(lost)
    with pytest.raises(TrainingError, match="gradient zero: heads.blocks.2.0.mlp.up_proj.weight"):
        arrival(model).before_step(ALL, fragments(model))
    lost.grad[0, 0] = torch.nan
    with pytest.raises(TrainingError, match="gradient not finite: heads.blocks.2.0.mlp.up_proj.weight"):
        arrival(model).before_step(ALL, fragments(model))


def test_a_parameter_the_optimizer_does_not_hold_is_named():
    model = build()
    optimizer = build_optimizer(model, OptimizerSection())
    optimizer.param_groups = [group for group in optimizer.param_groups if group["role"] != "heads"]
    watch = arrival(model)
    watch.before_step(ALL, fragments(model))
    optimizer.step()
    with pytest.raises(TrainingError, match="no change of heads.blocks.0"):
        watch.after_step(fragments(model))


def test_a_detached_head_is_caught(monkeypatch):
    recipe = tiny_recipe()
    model = tiny_model(recipe)
    forward = type(model.heads).forward
    monkeypatch.setattr(type(model.heads), "forward", lambda *arguments: forward(*arguments).detach())
    gradients_of(model, recipe, tiny_rows(recipe, 2))
    with pytest.raises(TrainingError, match="gradient zero: trunk.embed_tokens.weight.*no gradient: heads.blocks.0"):
        arrival(model).before_step(ALL, fragments(model))
