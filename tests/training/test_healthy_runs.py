"""Checks of a run stop no healthy one, whatever its configuration, and every broken one."""

import lightning as L
import pytest
import torch

from mtp_lightning.errors import TrainingError
from tests.support.drawn_runs import draw, fit, make_data


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("seed", range(3))
def test_a_healthy_run_is_not_stopped(seed, data):
    fit(*draw(seed, data))


@pytest.mark.parametrize(
    "number", [pytest.param(70, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.matrix)]
)
def test_many_healthy_runs_are_not_stopped(number, data):
    stopped = {}
    for seed in range(1000, 1000 + number):
        recipe, change = draw(seed, data)
        if (
            seed % 10 == 0 and "zero" not in change
        ):  # until every look is over; updates behind a frozen zero never learn
            recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"steps": 130})})
        try:
            fit(recipe, change)
        except TrainingError as error:
            stopped[seed] = f"{change}: {error}"
    assert stopped == {}


class Broken(L.Callback):
    """Breaks a run before its first step."""

    def __init__(self, breakage):
        self.breakage = breakage

    def on_train_start(self, trainer, pl_module):
        self.breakage(pl_module, trainer.optimizers[0])


def some_weight(module):
    return next(
        p for name, p in module.model.named_parameters() if p.requires_grad and p.dim() == 2 and "layers" in name
    )


def detach_a_head(module, optimizer):
    block = module.model.heads.blocks[0][0]
    forward = block.forward
    block.forward = lambda *arguments, **options: forward(*arguments, **options).detach()


def freeze_by_accident(module, optimizer):
    some_weight(module).requires_grad_(False)


def train_what_is_frozen(module, optimizer):
    next(p for p in module.model.parameters() if not p.requires_grad).requires_grad_(True)


def lose_a_gradient(module, optimizer):
    some_weight(module).register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))


def zero_a_gradient(module, optimizer):
    some_weight(module).register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", torch.zeros_like(p)))


def count_a_gradient_twice(module, optimizer):
    some_weight(module).register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", 2 * p.grad))


def keep_the_last_pass_only(module, optimizer):
    weight, seen = some_weight(module), []

    def keep(p):
        total = p.grad.clone()
        p.grad.sub_(seen[-1] if seen else 0)
        seen.append(total)

    weight.register_post_accumulate_grad_hook(keep)


def leave_out_of_the_optimizer(module, optimizer):
    weight = some_weight(module)
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if p is not weight]


def stop_a_role(module, optimizer):
    for group in optimizer.param_groups:
        if group["role"] == "heads":
            group["params"] = []


def train_a_copy(module, optimizer):
    """The optimizer holds parameters that the model no longer computes with."""
    for group in optimizer.param_groups:
        group["params"] = [torch.nn.Parameter(p.detach().clone()) for p in group["params"]]


BREAKAGES = {
    detach_a_head: "gradient",
    freeze_by_accident: "frozen all the same",
    train_what_is_frozen: "trained all the same",
    lose_a_gradient: "no gradient",
    zero_a_gradient: "gradient zero",
    count_a_gradient_twice: "must be the sum",
    keep_the_last_pass_only: "must be the sum",
    leave_out_of_the_optimizer: "no change of",
    stop_a_role: "no change of",
    train_a_copy: "no change of",
}


@pytest.mark.parametrize(
    ("breakage", "rate"),
    [
        pytest.param(breakage, rate, marks=() if (place + turn) % 2 else pytest.mark.slow)
        for place, breakage in enumerate(BREAKAGES)
        for turn, rate in enumerate((1e-3, 1e-5))
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_broken_run_is_stopped_in_its_first_step(breakage, rate, data):
    sound = {"heads": {"kind": "parallel"}, "adapt": {}, "objective": {}, "freeze": []}
    sound |= {"optimizer": {"lr": rate, "warmup_steps": 0}, "batch": {"micro_batch_size": 1, "global_batch_size": 3}}
    if breakage is train_what_is_frozen:
        sound["freeze"] = ["unembedding"]
    recipe, _ = draw(1, data, **sound)
    with pytest.raises(TrainingError, match=BREAKAGES[breakage]):
        fit(recipe, "none", Broken(breakage))
